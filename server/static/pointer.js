// Selection on the timeline, by mouse, touch and keys.

import { byId, h, show } from "./dom.js";
import { serverNow } from "./format.js";
import { describe, isOfServer } from "./lanes.js";

const REACH = 7; // pixels around a mark that mean it

export class Pointer {
  // `view` is the timeline: what it shows, and how it is zoomed, moved and drawn.
  constructor(view) {
    this.view = view;
    this.selected = null; // {model, key}
    const plot = byId("timeline-plot");
    plot.addEventListener("keydown", (event) => this.#onKey(event));
    plot.addEventListener("wheel", (event) => this.#onWheel(event), { passive: false });
    plot.addEventListener("pointerdown", (event) => this.#drag(event));
    plot.addEventListener("pointermove", (event) => this.#hover(event));
    plot.addEventListener("pointerleave", () => show(byId("timeline-tip"), false));
  }

  chosen() {
    const lane = this.view.lanes().find((each) => each.model_id === this.selected?.model);
    const item = lane?.items.find((each) => each.key === this.selected.key);
    return item ? { lane, item } : null;
  }

  #choose(lane, item) {
    this.selected = item ? { model: lane.model_id, key: item.key } : null;
    this.view.draw();
    const row = byId("timeline-rows").shown?.get(lane.model_id);
    row?.scrollIntoView({ block: "nearest" });
    this.#showDetail(lane, item);
  }

  #showDetail(lane, item) {
    const detail = byId("timeline-detail");
    if (!item) return show(detail, false);
    const [title, ...lines] = describe(lane, item), subject = item.segment ?? item.mark;
    const job = subject.job_id ?? subject.load_job_id;
    const links = [!isOfServer(lane) && ["Model", this.view.router.href("models", lane.model_id)], job && ["Job", this.view.router.href("jobs", job)],
      ["As of this moment", this.view.router.href("at", momentOf(item))]].filter(Boolean);
    detail.replaceChildren(h("p", {}, h("strong", {}, title)), ...lines.map((line) => h("p", {}, line)),
      h("p", { class: "links" }, ...links.map(([text, href]) => h("a", { href }, text))));
    show(detail, true);
  }

  #pick(event) {
    const row = event.target.closest?.(".lane");
    const lane = row && this.view.lanes().find((each) => each.model_id === row.dataset.model);
    const x = event.clientX - byId("timeline-axis").parentElement.getBoundingClientRect().left;
    if (!lane || x < 0) return { lane: null, item: null, x };
    const scale = this.view.scale(), time = scale.time(x), slack = (scale.to - scale.from) * (REACH / scale.width);
    const near = (item) => item.from - slack <= time && time <= item.to + slack;
    const marks = lane.items.filter((item) => item.kind === "mark" && near(item)).sort((a, b) => Math.abs(a.from - time) - Math.abs(b.from - time));
    const segments = lane.items.filter((item) => item.kind === "segment");
    const item = marks[0] ?? segments.find((each) => each.from <= time && time < each.to) ?? segments.findLast(near) ?? null;
    return { lane, item, x, time };
  }

  #hover(event) {
    const tip = byId("timeline-tip"), { lane, item } = this.#pick(event);
    if (!item || event.pointerType === "touch" || event.buttons) return show(tip, false);
    const [title, ...lines] = describe(lane, item);
    tip.replaceChildren(h("strong", {}, title), ...lines.map((line) => h("span", {}, line)));
    show(tip, true);
    const frame = byId("timeline").getBoundingClientRect(), size = tip.getBoundingClientRect();
    const left = Math.min(event.clientX - frame.left + 14, frame.width - size.width - 8);
    const below = event.clientY + 18 + size.height < innerHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${event.clientY - frame.top + (below ? 18 : -size.height - 12)}px`;
  }

  // A press without a move chooses; with a move it pulls the range along.
  #drag(event) {
    if (event.button !== 0 || event.target.closest("a")) return;
    const { lane, item, time } = this.#pick(event), plot = byId("timeline-plot");
    const begin = event.clientX, { from, to, width } = this.view.scale(), each = (to - from) / width;
    let moved = false;
    const move = (next) => {
      moved ||= Math.abs(next.clientX - begin) > 4;
      if (moved && event.pointerType !== "touch") this.view.window(from - (next.clientX - begin) * each, to - (next.clientX - begin) * each);
    };
    const end = (last) => {
      plot.removeEventListener("pointermove", move);
      removeEventListener("pointerup", end);
      removeEventListener("pointercancel", end);
      if (moved || last.type === "pointercancel" || time === undefined) return;
      if (lane) this.#choose(lane, item);
      this.view.visit(iso(Math.min(time, serverNow())));
    };
    plot.addEventListener("pointermove", move);
    addEventListener("pointerup", end);
    addEventListener("pointercancel", end);
  }

  #onWheel(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) {
      event.preventDefault();
      const { time } = this.#pick(event);
      this.view.zoom(event.deltaY > 0 ? 1.25 : 0.8, time ?? null);
    } else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      this.view.pan(Math.sign(event.deltaX || event.deltaY) * 0.1);
    }
  }

  #onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("a")) return;
    const lanes = this.view.lanes().filter((lane) => lane.items.length), chosen = this.chosen();
    const acts = {
      ArrowLeft: () => (event.shiftKey ? this.view.pan(-0.25) : this.#step(lanes, chosen, -1)),
      ArrowRight: () => (event.shiftKey ? this.view.pan(0.25) : this.#step(lanes, chosen, 1)),
      ArrowUp: () => this.#stepLane(lanes, chosen, -1),
      ArrowDown: () => this.#stepLane(lanes, chosen, 1),
      Home: () => chosen && this.#choose(chosen.lane, chosen.lane.items[0]),
      End: () => chosen && this.#choose(chosen.lane, chosen.lane.items.at(-1)),
      Enter: () => chosen && this.view.visit(momentOf(chosen.item)),
      "+": () => this.view.zoom(0.5),
      "=": () => this.view.zoom(0.5),
      "-": () => this.view.zoom(2),
      0: () => this.view.all(),
      Escape: () => this.view.visit(null),
    };
    if (!acts[event.key] || (event.shiftKey && event.key.startsWith("Arrow") && /Up|Down/.test(event.key))) return;
    event.preventDefault();
    acts[event.key]();
  }

  #step(lanes, chosen, by) {
    if (!chosen) return lanes.length && this.#choose(lanes.at(-1), lanes.at(-1).items.at(-1));
    const { items } = chosen.lane, next = items[items.indexOf(chosen.item) + by];
    if (next) this.#choose(chosen.lane, next);
  }

  // To the next lane with something in it, at about the same time.
  #stepLane(lanes, chosen, by) {
    if (!chosen) return this.#step(lanes, chosen, 0);
    const lane = lanes[lanes.indexOf(chosen.lane) + by];
    if (!lane) return;
    const distance = (item) => (item.from <= chosen.item.from && chosen.item.from < item.to ? 0 : Math.min(Math.abs(item.from - chosen.item.from), Math.abs(item.to - chosen.item.from)));
    this.#choose(lane, lane.items.reduce((best, item) => (distance(item) < distance(best) ? item : best)));
  }
}

// The moment at which an item begins: its event, else the time to the microsecond, which no `Date` has.
const momentOf = ({ mark, segment }) => String((mark ?? segment).position ?? segment.from);
const iso = (time) => new Date(time).toISOString();
