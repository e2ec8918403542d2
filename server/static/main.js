// The shell: signing in, navigation, the state of the connection, and the page that the address names.

import { api, errorText } from "./api.js";
import { closeDialog, dialog } from "./dialogs.js";
import { age, clock, oneLine } from "./format.js";
import { JobsPage } from "./jobs.js";
import { LedgerPage } from "./ledger.js";
import { retryNow, run } from "./live.js";
import { ModelPage } from "./modelpage.js";
import { NodesPage } from "./nodes.js";
import { Confinement, OverviewPage } from "./overview.js";
import { alarmingProblems, openProblems } from "./problems.js";
import { address, href } from "./router.js";
import { cleanToken, isSignInLink, keep, keepToken, keptToken, readSession, recall, takeSignInCode } from "./session.js";
import { connection, heardAt, isLost, nodes, now, resources, session, unready } from "./state.js";
import { TimelinePage } from "./timeline.js";
import { Boundary, effect, html, notices, render, signal, useEffect, useKeptFocus, useLayoutEffect, useRef } from "./ui.js";

const WHY = "loadledger.why"; // why the token was given up, over the reload that forgets everything else

const PAGES = { "": OverviewPage, timeline: TimelinePage, ledger: LedgerPage, jobs: JobsPage, nodes: NodesPage, models: ModelPage };

function Shell() {
  return html`
    <div class=${connection.value.mode === "lost" ? "old" : ""}>
      <a class="skip" href="#main" onClick=${skip}>Skip to the page</a>
      <div class="tops"><header class="top">
        <h1><a class="home" href="#/"><img src="/console/console.svg" alt="" width="22" height="22" />loadledger</a></h1>
        ${session.value && html`<${Navigation} /><${Connection} />`}
        <${Notices} />
        ${session.value && html`<${Who} />`}
        <a class="quiet" href="/docs">API</a>
        ${session.value && html`<button type="button" onClick=${() => signOut()}>Sign out</button>`}
      </header>
      ${session.value && html`<${Lost} /><${Confinement} />`}</div>
      <main id="main" tabindex="-1">${session.value ? html`<${Page} />` : html`<${SignIn} />`}</main>
      ${dialog.value && html`<${dialog.value.component} key=${dialog.value.key} ...${dialog.value.props} />`}
    </div>`;
}

const focusMain = () => document.getElementById("main").focus({ preventScroll: true });
const skip = (event) => (event.preventDefault(), focusMain()); // not by the address, which names a page

// What a role may not see is not offered; what is offered may still be refused, by the server, which decides.
function Navigation() {
  const { page } = address.value, open = alarmingProblems.value.length;
  const link = (name, text) => html`<a href=${href(name)} aria-current=${page === name ? "page" : null}>${text}</a>`;
  return html`
    <nav aria-label="Pages">
      ${link("", html`Overview${open > 0 && html` <span class="alarm">${open}<span class="unseen"> need attention</span></span>`}`)}
      ${session.value.audits && [link("timeline", "Timeline"), link("ledger", "Ledger")]}
      ${link("jobs", "Jobs")}
      ${nodes.value.length > 0 && link("nodes", "Nodes")}
    </nav>`;
}

// The page of the address. When it changes, its heading gets the focus, and a dialog of the page before is closed: both
// before the page is painted, when nobody can have opened a dialog of its own.
function Page() {
  const { page, id } = address.value, isReady = resources.value !== null, key = page === "models" ? `models ${id}` : page;
  const shown = useRef(key);
  useLayoutEffect(() => {
    if (!isReady || shown.current === key) return;
    shown.current = key;
    closeDialog();
    scrollTo(0, 0);
    document.querySelector("main h2")?.focus({ preventScroll: true });
  }, [key, isReady]);
  return isReady ? html`<div class="page"><${Boundary} key=${key}><${PAGES[page]} /><//></div>` : html`<p class="panel">Loading…</p>`;
}

function Connection() {
  const { mode, why } = connection.value;
  const polled = why ? "Every 3 s: no stream" : "Every 3 s";
  const isUnready = mode !== "lost" && unready.value.length > 0;
  const text = isUnready ? "Not ready" : { connecting: "Connecting…", live: "Live", polled, lost: "Not connected" }[mode];
  const reasons = unready.value.map(({ cause, cure }) => oneLine(`${cause}: ${cure}`)).join("; ");
  return html`
    <p id="connection" class="connection ${isUnready ? "unready" : mode}" title=${(isUnready ? reasons : why) || null}><span class="dot" aria-hidden="true"></span>${text}</p>`;
}

// The banner while the connection is lost. It counts seconds: the ear is told once.
function Lost() {
  const wasLoud = useRef(false), loud = isLost.value;
  wasLoud.current ||= loud;
  const said = loud ? "Not connected to the server. The data is old." : wasLoud.current ? "Connected again." : "";
  return html`<p id="connection-said" class="unseen" role="alert">${said}</p>${loud && html`<${Banner} />`}`;
}

function Banner() {
  const { since, why, retryAt } = connection.value, waits = Math.max(0, Math.ceil((retryAt - now.value) / 1000));
  const heard = clock(new Date(heardAt.value).toISOString());
  return html`
    <aside id="lost" class="banner" aria-label="Connection">
      <p><strong>Not connected for ${age((now.value - since) / 1000)}.</strong> The data is as of ${heard}. ${why}</p>
      <p>${retryAt && `Trying again in ${waits} s.`} <button type="button" onClick=${retryNow}>Try now</button></p>
    </aside>`;
}

function Notices() {
  useKeptFocus();
  return html`
    <ul id="notices" class="notices" aria-label="Results of your requests" aria-live="polite">
      ${notices.value.map(({ number, kind, text, withdraw }) => html`
        <li key=${number} class="notice ${kind}"><span>${text}</span>
          <button type="button" aria-label="Dismiss" onClick=${withdraw}>×</button></li>`)}
    </ul>`;
}

function Who() {
  const { subject, roles, expiresAt } = session.value;
  const has = roles === null ? "roles are not in the token" : roles.join(", ") || "no role";
  const until = expiresAt ? `until ${new Date(expiresAt).toLocaleString()}` : null;
  return html`<p id="who" class="who" title=${until}>${oneLine(`${subject} (${has})`, 200)}</p>`;
}

// Signing in and out.

const refusal = signal("");

function SignIn() {
  const field = useRef(), isAsking = useRef(false), keeps = useRef();
  useEffect(() => field.current.focus(), []);
  const submit = async (event) => {
    event.preventDefault();
    if (isAsking.current) return; // a double click signs in once
    isAsking.current = true;
    try {
      await signIn(field.current.value, keeps.current.checked);
    } finally {
      isAsking.current = false;
    }
  };
  return html`
    <section id="sign-in" class="panel sign-in" aria-labelledby="sign-in-title">
      <h2 id="sign-in-title">Sign in</h2>
      <form autocomplete="off" onSubmit=${submit}>
        ${refusal.value && html`<p id="sign-in-why" class="refusal" role="alert">${refusal.value}</p>`}
        <label for="token">Token</label>
        <input id="token" ref=${field} type="password" required autocomplete="off" autocapitalize="none" spellcheck=${false}
          aria-describedby="token-help" />
        <p id="token-help" class="hint"><code>loadledger console</code> opens this page signed in. Or create a token on the server:<br />
          <code>loadledger token --data DATA --role admin --subject YOU</code><br />
          The roles <code>audit</code> and <code>infer</code> see less and may do less.</p>
        <label class="check"><input ref=${keeps} type="checkbox" defaultChecked /> Keep it until this tab is closed</label>
        <button type="submit" class="primary">Sign in</button>
      </form>
    </section>`;
}

async function signIn(text, isKept) {
  const token = cleanToken(text);
  if (token === null) return (refusal.value = "This is not a token. A token has three parts of letters and digits, separated by dots.");
  api.token = token;
  try {
    await api.get("/api/v1/resources"); // any role may ask for these
  } catch (error) {
    api.token = null;
    return (refusal.value = error.status === 401 ? `The server does not accept this token: ${error.message}.` : errorText(error));
  }
  if (isKept) keepToken(token);
  start(token);
  focusMain();
}

function start(token) {
  api.token = token;
  session.value = readSession(token);
  run(signOut);
}

function signOut(why = "") {
  keepToken(null);
  keep("sessionStorage", WHY, why || null);
  location.reload(); // nothing of what was seen stays in memory
}

// A link signs in once; its token is kept for this tab, because the link cannot be used again.
async function signInByLink(code) {
  try {
    const { answer } = await api.post("/api/v1/sign-in-links/use", { code });
    keepToken(answer.token);
    start(answer.token);
  } catch (error) {
    refusal.value = error.status === 401 ? `The sign-in link does not work: ${error.message}.` : errorText(error);
  }
}

effect(() => {
  const { page, id } = address.value, isCritical = openProblems.value.some((each) => each.level === "critical");
  const isAlarm = isCritical || connection.value.mode === "lost";
  document.title = `${isAlarm ? "⚠ " : ""}loadledger: ${id && page === "models" ? id : page || "console"}`;
});

addEventListener("hashchange", () => isSignInLink() && location.reload()); // pasted where the console is open
const code = takeSignInCode(), kept = keptToken();
refusal.value = recall("sessionStorage", WHY) ?? "";
keep("sessionStorage", WHY, null);
if (code !== null) signInByLink(code);
else if (kept !== null && cleanToken(kept) !== null) start(kept);
render(html`<${Shell} />`, document.getElementById("console"));
