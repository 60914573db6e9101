// What the service serves, read once and again when it may have changed; all views look here.

import { ask } from "./api.js";

export const service = {
  models: [],
  collections: [],
  unavailable: [],
  templateSets: [],
  labelSets: [],
};

const listeners = [];

// Called after every refresh that succeeded.
export function onService(listener) {
  listeners.push(listener);
}

export async function refresh() {
  const [models, collections, labelSets] = await Promise.all([
    ask("v1/models"),
    ask("v1/collections"),
    ask("v1/label-sets"),
  ]);
  service.models = models.data;
  service.templateSets = models.template_sets;
  service.collections = collections.data;
  service.unavailable = collections.unavailable;
  service.labelSets = labelSets.data;
  for (const listener of listeners) listener();
}

export const collectionNamed = (name) => service.collections.find((one) => one.name === name);
export const modelOf = (collection) =>
  service.models.find((one) => one.id === collection?.model) ?? null;
