// The dialog of an inference: its request is written in JSON, and begins with zeros or ones of shapes that the model takes;
// a dropped or chosen file can take the place of an input's data.

import { api, errorText } from "./api.js";
import { Dialog } from "./dialogs.js";
import { duration, oneLine, plain } from "./format.js";
import { href } from "./router.js";
import { session } from "./state.js";
import { encodeRequest, exampleTensors, guessText, layoutOf, overview, parseTensors, readTensor, requestText, SCALES, shapeText } from "./tensors.js";
import { Hint, html, Refusal, useEffect, useMemo, useRef, useRequest, useState } from "./ui.js";

const SHOWN = 20_000; // characters of an answer
const LIMIT_MS = 120_000; // the server has its own limit

export function InferDialog({ model }) {
  const { answer: described, error } = useRequest((signal) => api.get(`/v2/models/${encodeURIComponent(model.id)}`, { signal }), []);
  const [written, setBody] = useState(null), [problem, setProblem] = useState(""), [said, setSaid] = useState(null);
  const [dropped, setDropped] = useState(null), inputs = described?.inputs ?? [];
  const files = useMemo(() => new Map(), []); // by name: the bytes that stand for it
  const asking = useRef(new AbortController()), body = written ?? (described ? requestText(exampleTensors(inputs)) : "");
  useEffect(() => () => asking.current.abort(), []); // nobody waits for the answer any more
  const ask = async () => {
    let form;
    setProblem("");
    try {
      form = encodeRequest(body, files);
    } catch (invalid) {
      return `This is not a valid request: ${invalid.message}`;
    }
    setSaid({ status: "Asked…" });
    try {
      setSaid(await infer(model, form, asking.current.signal));
    } catch (failed) {
      setSaid(null);
      if (!asking.current.signal.aborted) throw failed;
    }
    return false; // the answer is in the dialog
  };
  // Has an input take its data from a file: the request names it.
  const put = (input, name, tensor) => {
    files.set(name, tensor.data);
    const data = { name: input.name, datatype: tensor.datatype, shape: tensor.shape, data: name };
    setBody((before) => requestText(tensorsOf(before ?? body, inputs).map((each) => (each.name === input.name ? data : each))));
    setProblem("");
  };
  const drop = (event) => (event.preventDefault(), setDropped(event.dataTransfer.files[0] ?? null));
  const takes = inputs.map((input) => plain(`${input.name}: ${input.datatype} ${shapeText(input)}`, 200)).join(" · "), guess = guessText(inputs);
  const buttons = (send, isBusy) => html`<button type="submit" class="primary" disabled=${isBusy || !body}>Run inference</button>`;
  return html`
    <${Dialog} name="infer" kind="wide" title="Inference with ${model.id}" ask=${ask} buttons=${buttons} refusal=${error ? errorText(error) : problem}
        drops=${{ onDragOver: (event) => event.preventDefault(), onDrop: drop }} hint=${html`<${Answer} said=${said} />`}>
      <p id="infer-inputs" class="hint">${described ? takes : `Version ${model.version}.`}</p>
      <div class="infer-files">
        ${inputs.map((input, number) => html`
          <${FileField} key=${input.name} id="infer-file-${number}" input=${input} put=${put} refuse=${setProblem}
            dropped=${number === 0 ? dropped : null} />`)}
      </div>
      <label for="infer-body">Request, as of the Open Inference Protocol</label>
      <textarea id="infer-body" rows="9" spellcheck=${false} autocomplete="off" aria-describedby="infer-help" value=${body}
        onInput=${(event) => setBody(event.target.value)} />
      <p id="infer-help" class="hint">
        "zeros" or "ones" in place of data fill the shape, the name of a file above is what it holds. These are sent in binary.
      </p>
      ${guess && html`<${Hint}>${guess}<//>`}
    <//>`;
}

function tensorsOf(text, inputs) {
  try {
    return parseTensors(text).inputs;
  } catch {
    return exampleTensors(inputs);
  }
}

// A field for the file of an input, and what was made of it.
function FileField({ id, input, put, refuse, dropped }) {
  const [file, setFile] = useState(null), [scale, setScale] = useState("unit"), [said, setSaid] = useState("");
  const name = oneLine(input.name, 60), isScaled = file?.type.startsWith("image/") && input.datatype === "FP32";
  useEffect(() => void (dropped && setFile(dropped)), [dropped]);
  useEffect(() => {
    if (!file) return;
    readTensor(file, input, scale).then((tensor) => {
      setSaid(oneLine(`${file.name}: ${tensor.said}`, 300));
      put(input, file.name, tensor);
    }, (error) => {
      setSaid("");
      refuse(`${oneLine(file.name, 100)}: ${error.message}.`);
    });
  }, [file, scale]);
  return html`
    <div class="infer-file">
      <label for=${id}>${name} from a file</label>
      <input id=${id} type="file" accept=${layoutOf(input.shape) ? ".npy,image/*" : ".npy"}
        onChange=${(event) => event.target.files[0] && setFile(event.target.files[0])} />
      ${isScaled && html`
        <select aria-label="Values of the image for ${name}" value=${scale} onChange=${(event) => setScale(event.target.value)}>
          ${Object.entries(SCALES).map(([value, text]) => html`<option key=${value} value=${value}>${text}</option>`)}
        </select>`}
      <span class="hint" role="status">${said}</span>
    </div>`;
}

function Answer({ said }) {
  const output = ({ what, values }) => html`
    <p><span class="dim">${oneLine(what, 200)} </span><strong>${oneLine(values, 400)}</strong></p>`;
  return html`
    <p id="infer-status" role="status">${said?.status}</p>
    <div id="infer-outputs">${said?.outputs?.map(output)}</div>
    ${said?.text && html`<pre id="infer-answer" tabindex="0" role="group" aria-label="The answer">${said.text}</pre>`}
    ${said?.id && session.value.audits && html`
      <p class="links"><a href=${href("timeline", said.position)}>Its load, at position ${said.position}</a></p>
      <${RecordOf} key=${said.id} id=${said.id} model=${said.model} />`}`;
}

// The record of an answer, by the id that the answer has if the server records it.
function RecordOf({ id, model }) {
  const [isOpen, setOpen] = useState(false);
  return html`
    <details id="infer-record" onToggle=${(toggle) => setOpen(toggle.currentTarget.open)}>
      <summary>Its record, ${oneLine(id, 130)}</summary>${isOpen && html`<${RecordText} id=${id} model=${model} />`}
    </details>`;
}

function RecordText({ id, model }) {
  const query = new URLSearchParams({ id, model });
  const { answer, error } = useRequest((signal) => api.get(`/api/v1/records?${query}`, { signal }), []);
  if (!answer) return html`<${Refusal} text=${error && errorText(error)} />`;
  const lines = answer.records.map((each) => JSON.stringify(each, null, 2)).join("\n");
  return html`<pre tabindex="0" role="group" aria-label="The record">${lines ? plain(lines, SHOWN) : "This server has no record of it."}</pre>`;
}

async function infer(model, { body, headers }, signal) {
  const began = performance.now(), path = `/v2/models/${encodeURIComponent(model.id)}/infer`;
  const response = await api.send(path, { method: "POST", body, headers, signal, limitMs: LIMIT_MS });
  const text = await response.text(); // as it came: read into numbers, long integers would be rounded
  const source = response.headers.get("Loadledger-Model")?.replace(";position=", ", the ModelLoaded at position ");
  return {
    status: `Answered in ${duration((performance.now() - began) / 1000)}${source ? ` by ${source}` : ""}.`,
    outputs: overview(parseTensors(text).outputs ?? []),
    text: plain(text, SHOWN),
    id: response.headers.get("X-Request-Id"),
    position: source?.split(" ").at(-1),
    model: model.id,
  };
}
