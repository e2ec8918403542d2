// Asks a model from the page: a request is written in JSON, begun with zeros of the shapes that the model takes.

import { told } from "./api.js";
import { dialog } from "./dialogs.js";
import { byId, setText, show } from "./dom.js";
import { duration, plain } from "./format.js";
import { request, sent } from "./tensors.js";

const SHOWN = 20_000; // characters of an answer
const LIMIT_MS = 120_000; // the server has its own limit

export function predictDialog(api) {
  let model = null, asking = new AbortController();
  const about = dialog("predict", async () => {
    let written;
    try {
      written = sent(byId("predict-body").value);
    } catch (error) {
      about.refuse(`This is not a valid request: ${error.message}`);
      return false;
    }
    asking = new AbortController();
    await ask(api, model, written, asking.signal);
    return false; // the answer is in the dialog
  });
  about.node.addEventListener("close", () => asking.abort()); // nobody waits for the answer any more
  return async (asked) => {
    model = asked;
    setText(byId("predict-title"), `Predict with ${model.id}`);
    setText(byId("predict-inputs"), `Version ${model.version}.`);
    byId("predict-body").value = "";
    setText(byId("predict-told"), "");
    show(byId("predict-answer"), false);
    about.open();
    try {
      const described = await api.get(`/v2/models/${encodeURIComponent(model.id)}`);
      if (model !== asked || !about.node.open) return; // it is about another one
      setText(byId("predict-inputs"), described.inputs.map((input) => plain(`${input.name}: ${input.datatype} [${input.shape.join(", ")}]`, 200)).join(" · "));
      if (byId("predict-body").value === "") byId("predict-body").value = request(described.inputs);
    } catch (error) {
      if (model === asked) about.refuse(told(error));
    }
  };
}

async function ask(api, model, { body, headers }, signal) {
  const began = performance.now();
  setText(byId("predict-told"), "Asked…");
  show(byId("predict-answer"), false);
  try {
    const path = `/v2/models/${encodeURIComponent(model.id)}/infer`;
    const response = await api.send(path, { method: "POST", body, headers, signal, limitMs: LIMIT_MS });
    const answer = await response.text(); // as it came: read into numbers, long integers would be rounded
    const source = response.headers.get("Loadledger-Model");
    setText(byId("predict-told"), `Answered in ${duration((performance.now() - began) / 1000)}${source ? ` by ${source.replace(";position=", ", the ModelLoaded at position ")}` : ""}.`);
    setText(byId("predict-answer"), plain(answer, SHOWN));
    show(byId("predict-answer"), true);
  } catch (error) {
    if (signal.aborted) return;
    setText(byId("predict-told"), "");
    throw error;
  }
}
