// A new version from dropped or chosen files: sent one by one with their progress shown, then offered to be loaded.

import { dialog } from "./dialogs.js";
import { byId, notice, setText, show, showText } from "./dom.js";
import { bytes, oneLine } from "./format.js";

const MODEL = /\.onnx$/i;

// Returns `add`, which opens the dialog, and `takeDrops`, which has a part of the page take dropped files.
export function uploads(api, store, refresher, load) {
  let files = [], sending = null;
  const name = byId("upload-model"), version = byId("upload-version"), picked = byId("upload-file");
  const isReadOnly = () => store.readOnly || store.resources?.repository_writable === false;
  const about = dialog("upload", async () => {
    if (!files.some((file) => MODEL.test(file.name))) return about.refuse("Choose an ONNX file (.onnx), with the files that it names."), false;
    return send();
  });
  about.node.addEventListener("close", () => sending?.abort());
  byId("upload-progress").max = 1;
  picked.addEventListener("change", () => take([...picked.files]));
  name.addEventListener("input", suggest);
  takeDrops(about.node, null);
  document.body.classList.add("may-add");
  // A file that is dropped beside a target would take the place of the page.
  for (const type of ["dragover", "drop"]) addEventListener(type, (event) => event.dataTransfer?.types.includes("Files") && event.preventDefault());
  store.watch(() => document.body.classList.toggle("read-only", isReadOnly()));

  function take(chosen) {
    files = chosen;
    const names = oneLine(files.map((file) => file.name).join(", "), 200), model = files.find((file) => MODEL.test(file.name));
    showText(byId("upload-chosen"), files.length ? `${names}, ${bytes(size(files))}` : "");
    if (model && !name.value) name.value = idOf(model.name);
    suggest();
  }

  // The version after the newest that is known.
  function suggest() {
    const known = store.models.get(name.value.trim());
    version.value = Math.max(0, ...(known?.versions ?? [])) + 1;
  }

  async function send() {
    const id = name.value.trim(), number = Number(version.value), total = size(files), { signal } = (sending = new AbortController());
    const stages = `/api/v1/models/${encodeURIComponent(id)}/versions/${number}/stages`, headers = { "Content-Type": "application/octet-stream" };
    let stage = null, sent = 0;
    draw(0, total);
    try {
      stage = `${stages}/${(await api.post(stages, undefined, { signal })).answer.id}`;
      for (const file of files) {
        await api.upload(`${stage}/files/${encodeURIComponent(pathOf(file, files))}`, file, { headers, onProgress: (ofFile) => draw(sent + ofFile, total), signal });
        sent += file.size;
      }
      draw(total, total);
      await api.post(`${stage}/commit`, undefined, { signal, limitMs: 0 });
    } catch (error) {
      if (stage) api.send(stage, { method: "DELETE" }).catch(() => {}); // which ends by itself otherwise
      if (signal.aborted) return false;
      if (error.code === "repository_read_only") {
        store.readOnly = true;
        store.notify();
      }
      throw error;
    } finally {
      show(byId("upload-progress"), false);
      setText(byId("upload-status"), "");
    }
    about.node.close();
    notice(`Version ${number} of ${id} is added.`);
    refresher.schedule(id);
    load(store.models.get(id) ?? { id, versions: [number], state: "unloaded", version: null, error: null }, number);
    return true;
  }

  function draw(sent, total) {
    show(byId("upload-progress"), true);
    byId("upload-progress").value = total ? sent / total : 0;
    setText(byId("upload-status"), sent < total ? `${bytes(sent)} of ${bytes(total)} sent` : "Sent. The server checks it.");
  }

  function add({ modelId = "", dropped = [] } = {}) {
    byId("upload-form").reset();
    name.value = modelId;
    name.readOnly = modelId !== "";
    show(byId("upload-progress"), false);
    setText(byId("upload-status"), "");
    take(dropped);
    about.open();
  }

  // `where` names the model that the files are for; null is the open dialog.
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
      const dropped = [...event.dataTransfer.files];
      if (where === null) take(dropped);
      else add({ ...where, dropped });
    });
  }

  return { add, takeDrops };
}

const size = (files) => files.reduce((sum, file) => sum + file.size, 0);

// The only model has the usual name; other files keep theirs, by which the model names them.
const pathOf = (file, files) => (MODEL.test(file.name) && files.filter((each) => MODEL.test(each.name)).length === 1 ? "model.onnx" : file.name);

// A model's id from a file's name: what it may consist of.
export function idOf(fileName) {
  const stem = fileName.replace(MODEL, "");
  return stem.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 128);
}
