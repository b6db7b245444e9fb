/**
 * A path in words: where a mark was changed, what became of it, rows and tables of hops. Pure
 * functions of what a trace has found so far; `trace.ts` finds it and prints it.
 *
 * @module
 */

import { describe, type Hop, type Mark, markOf, sameDscp } from "../ffi/mod.ts";
import type { Arrival, Change, Exchange, Path } from "./exchange.ts";
import { Exit, Failure } from "./failure.ts";
import { markLabel } from "./report.ts";
import { plural, shortTime, wrap } from "./text.ts";
import { coversAllData, NOT_OBSERVED } from "./verdict.ts";

/** What a trace has found so far; its last hop is the target if that has answered. */
export interface TracedPath extends Pick<Path, "mark" | "path"> {
  /** What became of the request; `null` before there is one. */
  readonly exchange: Pick<Exchange, "sent" | "arrived" | "failure"> | null;
}

/** Where a mark was changed on a path, nearest first. */
export function changesOf({ mark, path }: Pick<Path, "mark" | "path">): Change[] {
  const changes: Change[] = [];
  let after = 0, from = mark.tos;
  for (const { hop, tos } of path) {
    if (tos === null) continue;
    if (!sameDscp(tos, from)) changes.push({ after, at: hop, from, to: tos });
    [after, from] = [hop!, tos];
  }
  return changes;
}

/** What went wrong: 102 if a hop received another mark, unless it was changed on this host. */
export function pathFailure(traced: TracedPath): Failure | null {
  const { mark, path, exchange } = traced, failure = exchange?.failure ?? null;
  const [change] = changesOf(traced);
  const own: number[] = [Exit.cannotRun, Exit.notMarked, Exit.sentChanged];
  if (change === undefined || own.includes(failure?.code ?? 0)) return failure;
  const other = failure?.code === Exit.arrivedChanged ? failure.cause : failure;
  const more = other instanceof Failure ? `; ${other.message}` : "";
  // Nobody saw the SYN leave, so this host may have changed it.
  const cause = change.after === 0 ? "this host or the path" : "the path";
  const message = `${cause} changed ${describe(mark)} to ${describe(markOf(change.to))} ` +
    `between ${hopName(change.after, path, false)} and ${hopName(change.at, path, false)}${more}`;
  return new Failure(Exit.arrivedChanged, message, failure?.hint);
}

/** The packet of this connection that the far end reports, the SYN if it can: as routers see it. */
export function reportedPacket(arrived: Arrival | null): { packet: string; tos: number } | null {
  if (arrived === null || arrived.isOther) return null;
  const packets = Object.entries({ SYN: arrived.syn, data: arrived.data, ACK: arrived.ack });
  const [packet, tos] = packets.find(([, tos]) => tos !== null)!;
  return { packet, tos: tos! };
}

/** The row of the hop that came last, below the table's head if it is the first. */
export function hopRow(traced: TracedPath, width: number): string {
  const { mark, path, exchange } = traced, hop = path.at(-1)!;
  const addressWidth = Math.max(15, path[0].address?.length ?? 0);
  const head = `hop  ${"address".padEnd(addressWidth)}     ms  mark there`.slice(0, width);
  const number = String(hop.hop ?? "?").padStart(3);
  let row = `${number}  (no answer)`;
  if (hop.address !== null) {
    const time = shortTime(hop.milliseconds!).padStart(6);
    const start = `${number}  ${hop.address.padEnd(addressWidth)} ${time}`;
    const isChanged = hop.tos !== null && changesOf(traced).at(-1)?.at === hop.hop;
    const text = `${markThere(hop, mark, exchange?.arrived)}${isChanged ? "   changed" : ""}`;
    const isWide = start.length + 2 + text.length > width;
    const indent = Math.max(3, Math.min(addressWidth + 12, width - 2 - text.length));
    row = `${start}${isWide ? `\n${" ".repeat(indent)}` : ""}  ${text}`;
  }
  return path.length === 1 ? `${head}\n${row}\n` : `${row}\n`;
}

/** What is known of the mark at a hop that answered. */
export function markThere(hop: Hop, mark: Mark, arrived: Arrival | null = null): string {
  const { tos, evidence, answer } = hop;
  const name = tos === null ? "" : describe(sameDscp(tos, mark.tos) ? mark : markOf(tos));
  if (evidence === "server") {
    return `connected; server reports ${reportedPacket(arrived)!.packet} ${name}`;
  }
  if (isTarget(hop)) return answer!;
  const there = tos !== null ? name : evidence === "icmp" ? "lower bits kept" : "unknown";
  return answer === "time exceeded" ? there : `${there}; ${answer}`;
}

function hopName(hop: number | null, path: readonly Hop[], withAddress = true): string {
  if (hop === 0) return "this host";
  const found = path.find((other) => other.hop === hop)!, { address } = found;
  // At an unknown distance the answer may be a router's as well.
  if (hop === null && !isTarget(found)) return `${address}, at an unknown distance`;
  const name = hop === null ? "the target" : `hop ${hop}`;
  return withAddress && address !== null ? `${name} (${address})` : name;
}

/** Whether it is the target itself that answered. */
function isTarget({ answer }: Hop): boolean {
  return answer === "connected" || answer === "connection refused";
}

/** What became of a mark, in a word and in a sentence that begins "it was". */
export function pathOutcome(traced: TracedPath): { sort: string; text: string } {
  const { path, exchange } = traced, { sent = NOT_OBSERVED, arrived = null } = exchange ?? {};
  const places = changesOf(traced).map((change) => {
    const isHere = change.after === 0 && sent.wrong !== null;
    const place = isHere ? "on this host" : placeOf(change, path);
    return `to ${describe(markOf(change.to))} ${place}`;
  });
  if (places.length > 0) return { sort: "changed", text: `changed ${places.join(", then ")}` };
  const seen = path.findLast(({ tos }) => tos !== null);
  if (seen === undefined) return { sort: "not shown", text: unseenText(path) };
  const isWhole = seen.evidence === "server", later = arrived?.changes[0];
  const far = isWhole ? "all the way" : `as far as ${hopName(seen.hop, path)}`;
  const other = sent.wrong !== null
    ? `the request left this host as ${describe(markOf(sent.wrong))}`
    : isWhole && later
    ? `${later.packet} arrived as ${describe(markOf(later.arrived))}`
    : null;
  if (other !== null) return { sort: "changed", text: `kept ${far} on the SYN, but ${other}` };
  if (!isWhole) {
    return { sort: "kept as far as shown", text: `kept ${far}, the last that showed it` };
  }
  const isAll = arrived !== null && coversAllData(arrived, sent);
  const text = isAll ? ": the server reports it" : " on the packets that the server reports";
  return { sort: "kept all the way", text: `kept ${far}${text}` };
}

/** What is known of a mark that no hop showed. */
function unseenText(path: readonly Hop[]): string {
  const hint = path.findLast(({ evidence }) => evidence === "icmp");
  if (hint !== undefined) {
    return `kept in its lower bits as far as ${hopName(hint.hop, path)}; no more is known`;
  }
  if (path.some(({ answer }) => answer === "time exceeded")) {
    return "not shown by the routers that answered";
  }
  return path[0]?.hop === 1 && isTarget(path[0])
    ? "not shown: the first hop is the target, which does not report it"
    : "not seen: no router answered, nothing is known of the path";
}

/** Between which two hops, and which in between do not show the mark. */
export function placeOf({ after, at }: Pick<Change, "after" | "at">, path: readonly Hop[]): string {
  const unseen = path.filter(({ hop, tos }) =>
    tos === null && hop !== null && hop > after && hop < (at ?? Infinity)
  );
  const numbers = unseen.map(({ hop }) => hop).join(", ");
  const state = unseen.every(({ answer }) => answer === null) ? "silent" : "unknown";
  const note = numbers === "" ? "" : ` (${state} in between: ${numbers})`;
  return `between ${hopName(after, path)} and ${hopName(at, path)}${note}`;
}

/** What is printed last: what became of the marks. @param isMany whether several were asked for */
export function pathReport(all: readonly TracedPath[], isMany: boolean, width: number): string {
  if (isMany) return all.length === 0 ? "" : marksReport(all, width);
  const [{ mark, path }] = all;
  if (path.length === 0) return "";
  return wrap(`${describe(mark)} was ${pathOutcome(all[0]).text}.`, width);
}

/** Several marks: a table if it fits, what was changed in words, and how many were kept. */
function marksReport(all: readonly TracedPath[], width: number): string {
  const rows = [["hop", "address", ...all.map(({ mark }) => markLabel(mark))]],
    lines: string[] = [];
  const longest = all.reduce((a, b) => a.path.length < b.path.length ? b : a);
  for (const [at, { hop }] of longest.path.entries()) {
    const hops = all.map(({ path }) => path[at]), answered = hops.filter((hop) => hop?.address);
    const [address = "(no answer)", ...others] = new Set(answered.map(({ address }) => address!));
    const cells = hops.map((hop, column) => markCell(hop, all[column].mark));
    const more = others.length > 0 ? ` +${others.length}` : "";
    rows.push([String(hop ?? "?").padStart(3), `${address}${more}`, ...cells]);
    if (answered.length === 0 || answered.length === hops.length) continue;
    const share = `it answered ${answered.length} of ${hops.length} probes`;
    lines.push(`Hop ${hop} (${address}) is partly silent: ${share}.`);
  }
  const changed = all.flatMap((traced) =>
    changesOf(traced).map((change) => ({
      label: markLabel(traced.mark),
      place: placeOf(change, traced.path),
      to: markLabel(markOf(change.to)),
    }))
  );
  for (const [place, here] of Map.groupBy(changed, ({ place }) => place)) {
    const words = [...Map.groupBy(here, ({ to }) => to)].map(([to, marks]) =>
      `${marks.map(({ label }) => label).join(", ")} → ${to}`
    );
    lines.push(`B${place.slice(1)}: ${words.join("; ")}`);
  }
  const outcomes = all.map((traced) => ({ traced, ...pathOutcome(traced) }));
  for (const { traced, sort, text } of outcomes) {
    if (sort !== "changed" || changesOf(traced).length > 0) continue;
    lines.push(`${markLabel(traced.mark)} was ${text}.`);
  }
  const counts = [...Map.groupBy(outcomes, ({ sort }) => sort)].map(([sort, some]) =>
    `${some.length} ${sort}`
  );
  lines.push(`Of ${plural(all.length, "mark")}: ${counts.join(", ")}.`);
  return (all.length <= 8 ? tableOf(rows, width) : "") +
    lines.map((line) => wrap(line, width)).join("");
}

/** What a table says of one mark at one hop. */
function markCell(hop: Hop | undefined, mark: Mark): string {
  if (!hop?.address) return "-";
  if (hop.tos === null) return hop.evidence === "icmp" ? "lower" : "?";
  return sameDscp(hop.tos, mark.tos) ? markLabel(mark) : `${markLabel(markOf(hop.tos))}!`;
}

/** Rows of cells as lines; none if they are too wide. */
function tableOf(rows: readonly string[][], width: number): string {
  const widths = rows[0].map((_, at) => Math.max(...rows.map((row) => row[at].length)) + 2);
  if (widths.reduce((sum, each) => sum + each) > width + 2) return "";
  const lineOf = (row: string[]) => row.map((cell, at) => cell.padEnd(widths[at])).join("");
  return rows.map((row) => `${lineOf(row).trimEnd()}\n`).join("");
}
