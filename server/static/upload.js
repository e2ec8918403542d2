// A new version from dropped or chosen files, sent one by one with their progress shown, then offered to be loaded.

import { api } from "./api.js";
import { Dialog, LoadDialog, openDialog } from "./dialogs.js";
import { bytes, named, oneLine } from "./format.js";
import { refreshSoon } from "./live.js";
import { models, readOnly, resources, session } from "./state.js";
import { computed, html, notice, useEffect, useMemo, useState } from "./ui.js";

const MODEL = /\.onnx$/i;

export const mayAdd = computed(() => Boolean(session.value?.manages) && !readOnly.value && resources.value?.repository_writable !== false);

export function addVersion(modelId = "", dropped = []) {
  openDialog(UploadDialog, { modelId, dropped });
}

// A file that is dropped beside a target would take the place of the page.
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
for (const type of ["dragover", "drop"]) addEventListener(type, (event) => hasFiles(event) && event.preventDefault());

// Properties of an element that takes dropped files, as versions of a model, or by `take`.
export function useDrops(modelId = "", take = (dropped) => addVersion(modelId, dropped)) {
  const [isOver, setOver] = useState(false);
  const accepts = (event) => {
    if (!mayAdd.value || !hasFiles(event)) return false;
    event.preventDefault();
    event.stopPropagation();
    return true;
  };
  return {
    class: isOver ? "over" : "",
    onDragOver: (event) => accepts(event) && setOver(true),
    onDragLeave: (event) => event.currentTarget.contains(event.relatedTarget) || setOver(false),
    onDrop: (event) => accepts(event) && (setOver(false), take([...event.dataTransfer.files])),
  };
}

function UploadDialog({ modelId, dropped }) {
  const [files, setFiles] = useState(dropped), [id, setId] = useState(modelId || nameOf(dropped));
  const [version, setVersion] = useState(nextVersion(id));
  const [sent, setSent] = useState(null), sending = useMemo(() => new AbortController(), []), total = size(files);
  const name = (text) => (setId(text), setVersion(nextVersion(text)));
  const take = (chosen) => {
    setFiles(chosen);
    if (!id) name(nameOf(chosen));
  };
  useEffect(() => () => sending.abort(), []); // nobody waits for it any more
  const ask = async () => {
    const model = id.trim();
    if (!files.some((file) => MODEL.test(file.name))) return "Choose an ONNX file (.onnx), with the files that it names.";
    try {
      await send(model, version, files, setSent, sending.signal);
    } catch (error) {
      if (sending.signal.aborted) return false;
      throw error;
    } finally {
      setSent(null);
    }
    notice(`${named(model, version)} is added.`);
    refreshSoon();
    const unloaded = { id: model, versions: [version], state: "unloaded", version: null, error: null };
    openDialog(LoadDialog, { model: models.value.get(model) ?? unloaded, version });
    return false;
  };
  const chosen = files.length > 0 && `${oneLine(files.map((file) => file.name).join(", "), 200)}, ${bytes(total)}`;
  const status = sent === null ? "" : sent < total ? `${bytes(sent)} of ${bytes(total)} sent` : "Sent. The server checks it.";
  const buttons = (send, isBusy) => html`<button type="submit" class="primary" disabled=${isBusy}>Add</button>`;
  const asked = () => ask().catch((error) => {
    if (error.code === "repository_read_only") readOnly.value = true;
    throw error;
  });
  return html`
    <${Dialog} name="upload" title="Add a version" ask=${asked} buttons=${buttons} drops=${useDrops(modelId, take)}>
      <label for="upload-file">Files</label>
      <input id="upload-file" type="file" multiple aria-describedby="upload-chosen upload-help" onChange=${(event) => take([...event.target.files])} />
      <p id="upload-chosen" class="figures">${chosen}</p>
      <p id="upload-help" class="hint">An ONNX file, and the files beside it that it names. You can drop them here.</p>
      <p id="upload-by-name" class="hint">Or by its name: <code>loadledger add ${modelId || "NAME"} hf://ORG/REPO</code></p>
      <label for="upload-model">Model</label>
      <input id="upload-model" required maxlength="128" pattern="[A-Za-z0-9][A-Za-z0-9._\\-]*" spellcheck=${false}
        title="Letters, digits, dots, underscores and hyphens" readonly=${modelId !== ""} value=${id} onInput=${(event) => name(event.target.value)} />
      <label for="upload-version">Version</label>
      <input id="upload-version" type="number" required min="1" inputmode="numeric" value=${version}
        onInput=${(event) => setVersion(Number(event.target.value))} />
      ${sent !== null && html`<progress aria-labelledby="upload-status" max="1" value=${total ? sent / total : 0} />`}
      <p id="upload-status" class="figures" role="status">${status}</p>
    <//>`;
}

// The version after the newest that is known.
const nextVersion = (id) => Math.max(0, ...(models.value.get(id.trim())?.versions ?? [])) + 1;

async function send(id, version, files, onSent, signal) {
  const uploads = `/api/v1/models/${encodeURIComponent(id)}/versions/${version}/uploads`;
  const headers = { "Content-Type": "application/octet-stream" };
  let upload = null, sent = 0;
  onSent(0);
  try {
    upload = `${uploads}/${(await api.post(uploads, undefined, { signal })).answer.id}`;
    for (const file of files) {
      const path = `${upload}/files/${encodeURIComponent(pathOf(file, files))}`;
      await api.upload(path, file, { headers, onProgress: (ofFile) => onSent(sent + ofFile), signal });
      sent += file.size;
    }
    onSent(sent);
    await api.post(`${upload}/commit`, undefined, { signal, limitMs: 0 });
  } catch (error) {
    if (upload) api.send(upload, { method: "DELETE" }).catch(() => {}); // which ends by itself otherwise
    throw error;
  }
}

const size = (files) => files.reduce((sum, file) => sum + file.size, 0);

// The only model has the usual name; other files keep theirs, by which the model names them.
function pathOf(file, files) {
  const isOnlyModel = MODEL.test(file.name) && files.filter((each) => MODEL.test(each.name)).length === 1;
  return isOnlyModel ? "model.onnx" : file.name;
}

// The model's id that the names of the files suggest, made of what an id may consist of, or "".
function nameOf(files) {
  const stem = (files.find((file) => MODEL.test(file.name))?.name ?? "").replace(MODEL, "");
  return stem.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 128);
}
