// Light, dark, or as the system has it. No module, for it must run before the first paint.
"use strict";

(() => {
  const ORDER = ["auto", "light", "dark"];
  const NAMES = { auto: "as the system", light: "light", dark: "dark" };
  const root = document.documentElement;

  function stored() {
    try {
      return localStorage.getItem("clipserve.theme");
    } catch {
      return null; // storage is switched off
    }
  }

  function apply(theme) {
    root.dataset.theme = theme;
    document.getElementById("theme-button")?.setAttribute("aria-label", `Colours: ${NAMES[theme]}`);
  }

  function next() {
    const theme = ORDER[(ORDER.indexOf(root.dataset.theme) + 1) % ORDER.length];
    apply(theme);
    try {
      localStorage.setItem("clipserve.theme", theme);
    } catch {
      return; // for this page only, then
    }
  }

  const theme = ORDER.includes(stored()) ? stored() : "auto";
  apply(theme);
  document.addEventListener("DOMContentLoaded", () => {
    apply(theme);
    document.getElementById("theme-button").addEventListener("click", next);
  });
})();
