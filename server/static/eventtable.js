// Generated from events/eventtext.py, which says what a part is; a test holds this file to it.

export const HASH_DIGITS = 12;

export const EVENT_TEXTS = {
  LoadRequested: {"parts": ["{cause}", "priority {priority}", "pinned?pinned"], "tone": "plain", "badIf": null},
  LoadJoined: {"parts": [], "tone": "plain", "badIf": null},
  LoadStarted: {"parts": ["attempt {attempt}"], "tone": "plain", "badIf": null},
  ModelLoaded: {"parts": ["{durations.total_us:ms}", "{memory_bytes:MB}", "threads {threads?}", "{files:files}"], "tone": "good", "badIf": null},
  ModelSettingsChanged: {"parts": ["pinned?pinned|not pinned", "keep_alive_s {keep_alive_s}"], "tone": "good", "badIf": null},
  LoadFailed: {"parts": ["{code}: {message}"], "tone": "bad", "badIf": null},
  UnloadRequested: {"parts": ["{cause}", "force?by force"], "tone": "plain", "badIf": null},
  UnloadJoined: {"parts": [], "tone": "plain", "badIf": null},
  UnloadStarted: {"parts": [], "tone": "plain", "badIf": null},
  ModelUnloaded: {"parts": ["{freed_bytes:MB} freed", "{drained_requests} requests drained", "{aborted_requests} aborted"], "tone": "plain", "badIf": null},
  UnloadFailed: {"parts": ["{code}: {message}"], "tone": "bad", "badIf": null},
  CancelRequested: {"parts": [], "tone": "plain", "badIf": null},
  JobCancelled: {"parts": ["superseded by job {superseded_by?}"], "tone": "plain", "badIf": null},
  AccessDenied: {"parts": ["{action}", "{count} times"], "tone": "bad", "badIf": null},
  WorkerExited: {"parts": ["signal {signal}", "exit code {exit_code}", "{stderr.-1}"], "tone": "bad", "badIf": null},
  ServerStarted: {"parts": ["unclean?the server before ended unexpectedly|", "the ledger's last event before was at {last_event_at?}", "the last event before was at {down_since?}", "the server was last seen at {last_seen_at?}", "workers could {confinement.not_prevented?:acts}"], "tone": "plain", "badIf": "unclean"},
  ServerStopped: {"parts": [], "tone": "plain", "badIf": null},
  ClockStepped: {"parts": ["from {from} to {to}", "taken?|not followed"], "tone": "bad", "badIf": null},
  RollbackAccepted: {"parts": ["signed up to {kept_position}", "accepted at {head_position}"], "tone": "bad", "badIf": null},
  VersionAdded: {"parts": ["{files:files}"], "tone": "good", "badIf": null},
  VersionRemoved: {"parts": ["{reason?}"], "tone": "plain", "badIf": null},
  TokenIssued: {"parts": ["for {subject}", "{roles:acts}", "until {expires_at}", "via {via?}", "id {jti}"], "tone": "plain", "badIf": null},
  TokenRevoked: {"parts": ["id {jti}"], "tone": "plain", "badIf": null},
  SignInLinkIssued: {"parts": ["id {link_id}"], "tone": "plain", "badIf": null},
  SignInLinkUsed: {"parts": ["id {link_id}"], "tone": "plain", "badIf": null},
};
