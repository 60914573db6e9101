// Pictures from outside the page: chosen, dropped or pasted. The view that shows gets them.

const handlers = new Map(); // view -> what it does with a list of files

export function onPictures(view, handle) {
  handlers.set(view, handle);
}

// `activeView()` names the view that shows.
export function listenForPictures(activeView) {
  const give = (files) => {
    const handle = handlers.get(activeView());
    if (handle && files.length) handle(files);
    return Boolean(handle && files.length);
  };
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dragging");
    if (!hasFiles(event)) return;
    event.preventDefault(); // even without a taker: the browser would leave the page for the file
    give([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => {
    if (give([...(event.clipboardData?.files ?? [])])) event.preventDefault();
  });
}

// The same file can be chosen again, for the input forgets it.
export function onChosen(input, handle) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = "";
    if (files.length) handle(files);
  });
}

export function toDataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error("This file cannot be read.")));
    reader.readAsDataURL(blob);
  });
}
