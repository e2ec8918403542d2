// Who is signed in. The token is kept in memory and, if that is wanted, in this tab's sessionStorage: never in
// a URL, never in what other tabs or later visits see. A sign-in link has no token, but a code for one.

const KEPT = "loadledger.token";

// What the browser keeps, by the name of its storage; null where that is forbidden: then memory has to do.
export function recall(storage, key) {
  try {
    return globalThis[storage].getItem(key);
  } catch {
    return null;
  }
}

export function keep(storage, key, value) {
  try {
    if (value === null) globalThis[storage].removeItem(key);
    else globalThis[storage].setItem(key, value);
  } catch {
    // it is forbidden
  }
}

export const keptToken = () => recall("sessionStorage", KEPT);
export const keepToken = (token) => keep("sessionStorage", KEPT, token);

const LINK = "#sign-in=";

export const isSignInLink = () => location.hash.startsWith(LINK);

// Returns the code of a sign-in link, or null, and takes it out of the address: history has no secrets.
export function takeSignInCode() {
  if (!isSignInLink()) return null;
  const code = location.hash.slice(LINK.length);
  history.replaceState(null, "", location.pathname + location.search);
  return code;
}

// What was pasted, without what often comes with it. Returns null for what cannot be a token.
export function cleanToken(text) {
  const token = text.trim().replace(/^(authorization:\s*)?bearer\s+/i, "");
  return /^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+$/.test(token) ? token : null;
}

// What a token says of itself. Nothing here is believed but by the eye: the server decides.
export function readSession(token) {
  const { sub, exp, roles: claimed } = payload(token);
  // Tokens of other issuers may have their roles elsewhere: then all is offered, and the server refuses.
  const roles = Array.isArray(claimed) ? claimed.filter((role) => typeof role === "string") : null;
  const has = (...any) => roles === null || any.some((role) => roles.includes(role));
  return {
    subject: typeof sub === "string" ? sub : "?",
    expiresAt: typeof exp === "number" ? exp * 1000 : null,
    roles,
    manages: has("admin"),
    infers: has("admin", "infer"),
    audits: has("admin", "audit"),
    approves: has("approve"),
    bypasses: has("emergency"),
  };
}

function payload(token) {
  try {
    const text = atob(token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/"));
    const claims = JSON.parse(new TextDecoder().decode(Uint8Array.from(text, (c) => c.charCodeAt(0))));
    return claims !== null && typeof claims === "object" ? claims : {};
  } catch {
    return {};
  }
}
