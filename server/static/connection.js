// The state of the connection in the header, and a banner while it is lost.

import { byId, setAttribute, setText, show } from "./dom.js";
import { age, clock, oneLine } from "./format.js";

const LOUD_AFTER_MS = 1500; // a server that starts again is back by then, and nobody needs to know

export function connectionView(store, updates, session) {
  byId("retry").addEventListener("click", () => updates.retryNow());
  let said = null;
  const draw = () => {
    const { mode, why, since, retryAt } = store.connection;
    const old = mode === "lost";
    const texts = {
      connecting: "Connecting…",
      live: "Live",
      polled: why ? "Every 3 s: no stream" : "Every 3 s",
      lost: "Not connected",
    };
    const loud = old && Date.now() - since > LOUD_AFTER_MS;
    if (loud !== said) say(loud, said !== null);
    said = loud;
    setText(byId("connection-text"), texts[mode]);
    setAttribute(byId("connection"), "class", `connection ${mode}`);
    setAttribute(byId("connection"), "title", why || null);
    document.body.classList.toggle("old", old);
    show(byId("lost"), loud);
    if (!old) return;
    setText(byId("lost-title"), `Not connected for ${age((Date.now() - since) / 1000)}.`);
    setText(byId("lost-text"), `The data is as of ${clock(new Date(store.heardAt).toISOString())}. ${why}`);
    setText(byId("lost-next"), retryAt ? `Trying again in ${Math.max(0, Math.ceil((retryAt - Date.now()) / 1000))} s.` : "");
  };
  setText(byId("who"), whoText(session));
  setAttribute(byId("who"), "title", session.expiresAt ? `until ${new Date(session.expiresAt).toLocaleString()}` : null);
  show(byId("who"), true);
  show(byId("connection"), true);
  store.watch(draw);
}

// To the ear, once: the banner counts seconds.
function say(loud, before) {
  setText(byId("connection-said"), loud ? "Not connected to the server. The data is old." : before ? "Connected again." : "");
}

function whoText(session) {
  const roles = session.roles === null ? "roles are not in the token" : session.roles.join(", ") || "no role";
  return oneLine(`${session.subject} (${roles})`, 200);
}
