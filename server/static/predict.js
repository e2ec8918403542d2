// The dialog of an inference: its request is written in JSON, and begins with zeros of the shapes that the model takes;
// a dropped or chosen file can take the place of an input's data.

import { dialog } from "./dialogs.js";
import { byId, h, setText, show } from "./dom.js";
import { duration, oneLine, plain } from "./format.js";
import { encodeRequest, layoutOf, overview, readTensor, requestText, SCALES, zeroTensors } from "./tensors.js";

const SHOWN = 20_000; // characters of an answer
const LIMIT_MS = 120_000; // the server has its own limit

export function predictDialog(api) {
  let model = null, asking = new AbortController(), inputs = [];
  const files = new Map(); // by name: the bytes that stand for it
  const about = dialog("predict", async () => {
    let form;
    try {
      form = encodeRequest(byId("predict-body").value, files);
    } catch (error) {
      about.refuse(`This is not a valid request: ${error.message}`);
      return false;
    }
    asking = new AbortController();
    await ask(api, model, form, asking.signal);
    return false; // the answer is in the dialog
  });
  about.node.addEventListener("close", () => asking.abort()); // nobody waits for the answer any more
  about.node.addEventListener("dragover", (event) => event.preventDefault());
  about.node.addEventListener("drop", (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files, [first] = byId("predict-files").children;
    if (file && first) first.take(file);
  });

  // Has an input take its data from a file: the request names it.
  const put = (input, name, tensor) => {
    files.set(name, tensor.data);
    let tensors;
    try {
      tensors = JSON.parse(byId("predict-body").value).inputs;
    } catch {
      tensors = zeroTensors(inputs);
    }
    const data = { name: input.name, datatype: tensor.datatype, shape: tensor.shape, data: name };
    byId("predict-body").value = requestText(tensors.map((each) => (each.name === input.name ? data : each)));
    about.refuse("");
  };

  return (asked) => {
    model = asked;
    files.clear();
    setText(byId("predict-title"), `Predict with ${model.id}`);
    setText(byId("predict-inputs"), `Version ${model.version}.`);
    byId("predict-body").value = "";
    byId("predict-files").replaceChildren();
    clear();
    about.open();
    about.complete((signal) => api.get(`/v2/models/${encodeURIComponent(model.id)}`, { signal }), (described) => {
      inputs = described.inputs;
      setText(byId("predict-inputs"), inputs.map((input) => plain(`${input.name}: ${input.datatype} [${input.shape.join(", ")}]`, 200)).join(" · "));
      byId("predict-files").replaceChildren(...inputs.map((input, number) => fileField(input, number, put, about.refuse)));
      if (byId("predict-body").value === "") byId("predict-body").value = requestText(zeroTensors(inputs));
    });
  };
}

// A field for the file of an input, and what was made of it.
function fileField(input, number, put, refuse) {
  const id = `predict-file-${number}`, said = h("span", { class: "hint", role: "status" });
  const picked = h("input", { id, type: "file", accept: layoutOf(input.shape) ? ".npy,image/*" : ".npy" });
  const scale = h("select", { "aria-label": `Values of the image for ${oneLine(input.name, 60)}`, hidden: true }, ...Object.entries(SCALES).map(([value, text]) => h("option", { value }, text)));
  const node = h("div", { class: "predict-file" }, h("label", { for: id }, `${oneLine(input.name, 60)} from a file`), picked, scale, said);
  let file = null;
  const read = async () => {
    if (file === null) return;
    show(scale, file.type.startsWith("image/") && input.datatype === "FP32");
    try {
      const tensor = await readTensor(file, input, scale.value);
      setText(said, oneLine(`${file.name}: ${tensor.said}`, 300));
      put(input, file.name, tensor);
    } catch (error) {
      setText(said, "");
      refuse(`${oneLine(file.name, 100)}: ${error.message}.`);
    }
  };
  node.take = (chosen) => ((file = chosen), read());
  picked.addEventListener("change", () => picked.files[0] && node.take(picked.files[0]));
  scale.addEventListener("change", read);
  return node;
}

function clear() {
  setText(byId("predict-status"), "");
  byId("predict-outputs").replaceChildren();
  show(byId("predict-answer"), false);
}

async function ask(api, model, { body, headers }, signal) {
  const began = performance.now();
  clear();
  setText(byId("predict-status"), "Asked…");
  try {
    const path = `/v2/models/${encodeURIComponent(model.id)}/infer`;
    const response = await api.send(path, { method: "POST", body, headers, signal, limitMs: LIMIT_MS });
    const answer = await response.text(); // as it came: read into numbers, long integers would be rounded
    const source = response.headers.get("Loadledger-Model");
    setText(byId("predict-status"), `Answered in ${duration((performance.now() - began) / 1000)}${source ? ` by ${source.replace(";position=", ", the ModelLoaded at position ")}` : ""}.`);
    drawOutputs(answer);
    setText(byId("predict-answer"), plain(answer, SHOWN));
    show(byId("predict-answer"), true);
  } catch (error) {
    if (signal.aborted) return;
    setText(byId("predict-status"), "");
    throw error;
  }
}

function drawOutputs(answer) {
  const outputs = overview(JSON.parse(answer).outputs ?? []);
  byId("predict-outputs").replaceChildren(...outputs.map(({ what, values }) => h("p", {}, h("span", { class: "dim" }, `${oneLine(what, 200)} `), h("strong", {}, oneLine(values, 400)))));
}
