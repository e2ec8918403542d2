// A new version from a dropped or chosen file: sent with its progress shown, then offered to be loaded.

import { dialog } from "./dialogs.js";
import { byId, setText, show, showText } from "./dom.js";
import { bytes, oneLine } from "./format.js";

const FORMS = [
  [/\.onnx$/i, "application/octet-stream"],
  [/\.(tar|tar\.gz|tgz)$/i, "application/x-tar"],
];

// Returns `add`, which opens the dialog, and `takeDrops`, which has a part of the page take a dropped file.
export function uploads(api, store, actions) {
  let file = null, sending = null;
  const name = byId("upload-model"), version = byId("upload-version"), picked = byId("upload-file");
  const isReadOnly = () => store.readOnly || store.resources?.repository_writable === false;
  const about = dialog("upload", async () => {
    const form = FORMS.find(([pattern]) => pattern.test(file?.name ?? ""));
    if (!form) return about.refuse(file ? "Choose an ONNX file (.onnx), or a tar of a version's folder (.tar, .tar.gz)." : "Choose a file."), false;
    return send(form[1]);
  });
  about.node.addEventListener("close", () => sending?.abort());
  byId("upload-progress").max = 1;
  picked.addEventListener("change", () => take(picked.files[0] ?? null));
  name.addEventListener("input", suggest);
  takeDrops(about.node, null);
  document.body.classList.add("may-add");
  // A file that is dropped beside a target would take the place of the page.
  for (const type of ["dragover", "drop"]) addEventListener(type, (event) => event.dataTransfer?.types.includes("Files") && event.preventDefault());
  store.watch(() => document.body.classList.toggle("read-only", isReadOnly()));

  function take(chosen) {
    file = chosen;
    showText(byId("upload-chosen"), file ? `${oneLine(file.name, 200)}, ${bytes(file.size)}` : "");
    if (file && !name.value) name.value = idOf(file.name);
    suggest();
  }

  // The version after the newest that is known.
  function suggest() {
    const known = store.models.get(name.value.trim());
    version.value = Math.max(0, ...(known?.versions ?? [])) + 1;
  }

  async function send(type) {
    const id = name.value.trim(), number = Number(version.value), total = file.size;
    sending = new AbortController();
    draw(0, total);
    try {
      const path = `/api/v1/models/${encodeURIComponent(id)}/versions/${number}`;
      await api.upload(path, file, { headers: { "Content-Type": type, "If-None-Match": "*" }, onProgress: (sent) => draw(sent, total), signal: sending.signal });
    } catch (error) {
      if (sending.signal.aborted) return false;
      if (error.code === "repository_read_only") {
        store.readOnly = true;
        store.changed();
      }
      throw error;
    } finally {
      show(byId("upload-progress"), false);
      setText(byId("upload-told"), "");
    }
    about.node.close();
    actions.noticed(`Version ${number} of ${id} is added.`);
    actions.refresh(id);
    if (actions.load) actions.load(store.models.get(id) ?? { id, versions: [number], state: "unloaded", version: null, error: null }, number);
    return true;
  }

  function draw(sent, total) {
    show(byId("upload-progress"), true);
    byId("upload-progress").value = total ? sent / total : 0;
    setText(byId("upload-told"), sent < total ? `${bytes(sent)} of ${bytes(total)} sent` : "Sent. The server checks it.");
  }

  function add({ modelId = "", dropped = null } = {}) {
    byId("upload-form").reset();
    name.value = modelId;
    name.readOnly = modelId !== "";
    show(byId("upload-progress"), false);
    setText(byId("upload-told"), "");
    take(dropped);
    about.open();
  }

  // `where` names the model that a file is for; null is the open dialog.
  function takeDrops(node, where) {
    const may = (event) => !isReadOnly() && event.dataTransfer?.types.includes("Files");
    node.classList.add("drops");
    node.addEventListener("dragover", (event) => {
      if (!may(event)) return;
      event.preventDefault();
      event.stopPropagation();
      node.classList.add("over");
    });
    node.addEventListener("dragleave", (event) => node.contains(event.relatedTarget) || node.classList.remove("over"));
    node.addEventListener("drop", (event) => {
      if (!may(event)) return;
      event.preventDefault();
      event.stopPropagation();
      node.classList.remove("over");
      const dropped = event.dataTransfer.files[0] ?? null;
      if (where === null) take(dropped);
      else add({ ...where, dropped });
    });
  }

  return { add, takeDrops };
}

// A model's id from a file's name: what it may consist of.
export function idOf(fileName) {
  const stem = fileName.replace(/\.(onnx|tar|tar\.gz|tgz)$/i, "");
  return stem.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 128);
}
