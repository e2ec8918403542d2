// Entry point: signing in, and the views and actions that the roles allow.

import { Operations } from "./operations.js";
import { Api, errorText } from "./api.js";
import { attentionView } from "./attention.js";
import { TimeSeries } from "./charts.js";
import { connectionView } from "./connection.js";
import { loadDialog, unloadDialog } from "./dialogs.js";
import { byId, show, showText } from "./dom.js";
import { jobPage, jobsView } from "./jobs.js";
import { Ledger } from "./ledger.js";
import { LiveUpdates } from "./liveupdates.js";
import { memoryView } from "./memory.js";
import { ModelPage } from "./modelpage.js";
import { modelsView } from "./models.js";
import { drainDialog, nodesView } from "./nodes.js";
import { predictDialog } from "./predict.js";
import { Refresher } from "./refresher.js";
import { Router } from "./router.js";
import { cleanToken, isSignInLink, keep, keepToken, keptToken, recall, Session, takeSignInCode } from "./session.js";
import { Store } from "./store.js";
import { Timeline } from "./timeline.js";
import { TimeTravel } from "./timetravel.js";
import { uploads } from "./upload.js";

const WHY = "loadledger.why"; // why the token was given up, over the reload that forgets everything else

function startConsole(token) {
  const api = new Api(token), session = new Session(token), store = new Store(), router = new Router();
  const refresher = new Refresher(api, store, session, (error) => updates.endAttempt(error)), operations = new Operations(api, store, refresher);
  const updates = new LiveUpdates(api, store, refresher, { follows: session.audits, onSignedOut: signOut });
  show(byId("sign-in"), false);
  show(byId("console"), true);
  show(byId("sign-out"), true);
  const actions = allowedActions(session, api, store, operations);
  connectionView(store, updates, session);
  attentionView(store, actions);
  const series = new TimeSeries(api, store);
  memoryView(store, series);
  nodesView(store, actions);
  modelsView(store, actions);
  if (session.audits) {
    const timeTravel = new TimeTravel(api, store, router, (time) => timeline.mark(time));
    const timeline = new Timeline(api, store, router, (at) => timeTravel.visit(at));
    const ledger = new Ledger(api, store, (position) => timeTravel.visit(String(position), { scrolls: true }));
    actions.trace = (job) => ledger.showJob(job.id, { scrolls: true });
    jobPage(api, router, ledger);
  }
  jobsView(store, actions);
  if (session.manages) offerUploads(api, store, refresher, actions);
  router.watch(({ view }) => showView(view)); // before the page of a model, which takes the focus
  new ModelPage({ api, store, router, series, actions, session });
  setInterval(() => store.notify(), 1000); // "3 s ago" goes on where nothing happens
  updates.run();
}

// Adding versions, to the list of models and to the page of each.
function offerUploads(api, store, refresher, actions) {
  Object.assign(actions, uploads(api, store, refresher, actions.load));
  byId("models-add").addEventListener("click", () => actions.add());
  show(byId("models-add"), true);
  actions.takeDrops(document.querySelector("section.models"), {});
}

// Which part of the page an address shows. A model has a page of its own; all else stands in the overview.
function showView(view) {
  show(byId("model-page"), view === "models");
  show(byId("overview"), view !== "models");
}

// What a role may not do is not offered; what is offered may still be refused, by the server, which decides.
function allowedActions(session, api, store, operations) {
  return {
    ...(session.manages && {
      load: loadDialog(api, store, operations),
      unload: unloadDialog(store, operations),
      pin: (model, pinned) => operations.pin(model, pinned),
      cancel: (job) => operations.cancel(job),
      drain: drainDialog(store, operations),
    }),
    ...(session.predicts && { predict: predictDialog(api) }),
  };
}

function signOut(why = "") {
  keepToken(null);
  keep("sessionStorage", WHY, why);
  location.reload(); // nothing of what was seen stays in memory
}

// A link signs in once; its token is kept for this tab, because the link cannot be used again.
async function signInByLink(code) {
  let token;
  try {
    token = (await new Api(null).post("/api/v1/sign-in-links/use", { code })).answer.token;
  } catch (error) {
    return askForToken(error.status === 401 ? `The sign-in link does not work: ${error.message}.` : errorText(error));
  }
  keepToken(token);
  startConsole(token);
}

function askForToken(why = signOutReason()) {
  const form = byId("sign-in-form"), field = byId("token");
  show(byId("sign-in"), true);
  showText(byId("sign-in-why"), why);
  field.focus();
  let asking = false;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (asking) return; // a double click signs in once: two pages in one would show everything twice
    asking = true;
    try {
      await signIn(field);
    } finally {
      asking = false;
    }
  });
}

async function signIn(field) {
  const token = cleanToken(field.value);
  if (token === null) return showText(byId("sign-in-why"), "This is not a token. A token has three parts of letters and digits, separated by dots.");
  try {
    await new Api(token).get("/api/v1/resources"); // any role may ask for these
  } catch (error) {
    return showText(byId("sign-in-why"), error.status === 401 ? `The server does not accept this token: ${error.message}.` : errorText(error));
  }
  field.value = "";
  if (byId("keep").checked) keepToken(token);
  startConsole(token);
  byId("main").focus({ preventScroll: true });
}

function signOutReason() {
  const why = recall("sessionStorage", WHY) ?? "";
  keep("sessionStorage", WHY, null);
  return why;
}

byId("sign-out").addEventListener("click", () => signOut());
addEventListener("hashchange", () => isSignInLink() && location.reload()); // pasted where the console is open
const code = takeSignInCode(), kept = keptToken();
if (code !== null) signInByLink(code);
else if (kept !== null && cleanToken(kept) !== null) startConsole(kept);
else askForToken();
