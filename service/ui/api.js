// Talking with the service: one function for requests, one for pictures, and the API key.

const KEY = "clipserve.key"; // of sessionStorage: gone with the tab

let key = readKey();

export class ApiError extends Error {
  constructor(message, status = 0, { code = null, param = null, retryAfterS = 1 } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
    this.retryAfterS = retryAfterS;
  }
}

export const isAbort = (error) => error?.name === "AbortError";
export const isUnauthorised = (error) => error?.status === 401;

export const hasKey = () => key !== "";

export function useKey(text) {
  key = text.trim();
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    return; // storage is switched off: for this page only, then
  }
}

// The answer's JSON. A JSON body is given as `json`, a form as `form`, lines of JSON as `lines`.
// Throws ApiError, AbortError.
export async function ask(path, { method = "GET", json, form, lines, signal } = {}) {
  const type = json === undefined ? lines && "application/x-ndjson" : "application/json";
  const headers = type ? { "Content-Type": type } : {};
  const body = json === undefined ? (lines ?? form) : JSON.stringify(json);
  const response = await send(path, { method, headers, body, signal });
  try {
    return await response.json();
  } catch {
    signal?.throwIfAborted(); // our own abort, half way through
    throw new ApiError("The service sent an answer that is no JSON.", response.status);
  }
}

export async function askText(path, signal) {
  return (await send(path, { signal })).text();
}

// Put a stored picture into an <img>; behind a key it is fetched, for an <img> sends no headers.
export async function showStored(image, url) {
  if (!hasKey()) {
    image.src = url;
    return;
  }
  try {
    showBlob(image, await (await send(url, {})).blob());
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

// The object URL lives until the picture was read, or could not be.
export function showBlob(image, blob) {
  const url = URL.createObjectURL(blob);
  image.loading = "eager"; // a lazy one might never be read
  const revoke = () => URL.revokeObjectURL(url);
  image.addEventListener("load", revoke, { once: true });
  image.addEventListener("error", revoke, { once: true });
  image.src = url;
}

// One request at a time: the next takes the place of the one before.
export class Latest {
  #controller = null;

  begin() {
    this.stop();
    this.#controller = new AbortController();
    return this.#controller.signal;
  }

  stop() {
    this.#controller?.abort();
    this.#controller = null;
  }
}

export const collectionPath = (name) => `v1/collections/${encodeURIComponent(name)}`;

async function send(path, { headers = {}, signal, ...options }) {
  const all = key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
  let response;
  try {
    response = await fetch(path, { ...options, headers: all, signal });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError("The service cannot be reached.");
  }
  if (response.ok) return response;
  const content = await response.json().catch(() => null);
  signal?.throwIfAborted();
  const told = content?.error ?? {};
  const message = told.message ?? `The service answered with status ${response.status}.`;
  const retryAfterS = Number(response.headers.get("Retry-After")) || 1;
  throw new ApiError(message, response.status, { ...told, retryAfterS });
}

function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}
