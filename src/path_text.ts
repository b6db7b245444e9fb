/**
 * A path in words: where a mark was changed, what became of it, rows and tables of hops. Pure
 * functions of what a trace has found so far; `trace.ts` finds it and prints it.
 *
 * @module
 */

import { describe, type Mark, markOf, sameDscp } from "../ffi/dscp.ts";
import { TIME_EXCEEDED } from "../ffi/icmp.ts";
import { type Hop, REFUSED } from "../ffi/probe.ts";
import { behaviourText } from "./behaviour.ts";
import type { Arrival, Change, Exchange, Path } from "./exchange.ts";
import { Exit, Failure } from "./failure.ts";
import { markLabel } from "./report.ts";
import { plural, shortTime, wrap } from "./text.ts";
import { coversAllData, NOT_OBSERVED } from "./verdict.ts";

type Marked = Pick<Path, "mark" | "path">;

/** What a trace has found so far; its last hop is the target if that has answered. */
export interface TracedPath extends Marked {
  /** What became of the request; `null` before there is one. */
  readonly exchange: Pick<Exchange, "sent" | "arrived" | "returned" | "failure"> | null;
  /** Whether the target answered only another port of this host than the probes had. */
  readonly isFreshPort: boolean;
}

/** Where a mark was changed on a path, nearest first. */
export function changesOf({ mark, path }: Marked): Change[] {
  const changes: Change[] = [];
  let after = 0, from = mark.tos;
  for (const { hop, tos } of path) {
    if (tos === null) continue;
    if (!sameDscp(tos, from)) changes.push({ after, at: hop, from, to: tos });
    [after, from] = [hop!, tos];
  }
  return changes;
}

/** Whether a mark comes back after it was changed, as if packets took several ways. */
function isDisagreeing({ mark, path }: Marked): boolean {
  const seen = new Set([mark.dscp]);
  return changesOf({ mark, path }).some(({ to }) => seen.size === seen.add(to >> 2).size);
}

/** The silent hops whose answer could change what is said of the mark. */
export function openHops({ mark, path }: Marked): number[] {
  const last = path.findLastIndex(hasAnswered);
  return path.flatMap(({ hop, answer }, at) => {
    // Behind the last answer, others can only follow if the next hop answers.
    if (hop === null || answer !== null || at > last + 1) return [];
    const before = path.slice(0, at).findLast(({ tos }) => tos !== null)?.tos ?? mark.tos;
    const behind = path.slice(at).find(({ tos }) => tos !== null)?.tos ?? null;
    return behind !== null && sameDscp(before, behind) ? [] : [hop];
  });
}

/** What went wrong: 102 if a hop received another mark, unless it was changed on this host. */
export function pathFailure(traced: TracedPath): Failure | null {
  const { mark, path, exchange } = traced, failure = exchange?.failure ?? null;
  const [change] = changesOf(traced);
  const own: number[] = [Exit.cannotRun, Exit.notMarked, Exit.sentChanged];
  if (change === undefined || own.includes(failure?.code ?? 0)) return failure;
  const other = failure?.code === Exit.arrivedChanged ? failure.cause : failure;
  const more = other instanceof Failure ? `; ${other.message}` : "";
  const after = hopName(change.after, path, false), at = hopName(change.at, path, false);
  const before = describe(mark), behind = describe(markOf(change.to));
  // Nobody saw the SYN leave, so this host may have changed it.
  const cause = change.after === 0 ? "this host or the path" : "the path";
  const message = isDisagreeing(traced)
    ? `the hops disagree on ${before}, as if packets took several ways; ${at} received ${behind}`
    : `${cause} changed ${before} to ${behind} between ${after} and ${at}`;
  return new Failure(Exit.arrivedChanged, message + more, failure?.hint);
}

/** The packet of this connection that the far end reports, the SYN if it can: as routers see it. */
export function reportedPacket(arrived: Arrival | null): { packet: string; tos: number } | null {
  if (arrived === null || arrived.isOther) return null;
  const packets = Object.entries({ SYN: arrived.syn, data: arrived.data, ACK: arrived.ack });
  const [packet, tos] = packets.find(([, tos]) => tos !== null)!;
  return { packet, tos: tos! };
}

/** The row of a hop, below the table's head if it is the first. */
export function hopRow(traced: TracedPath, hop: Hop, width: number, isFirst: boolean): string {
  const { mark, path, exchange } = traced;
  const size = Math.max(15, path[0].address?.length ?? 0);
  const head = `hop  ${"address".padEnd(size)}     ms  mark there`.slice(0, width);
  const number = String(hop.hop ?? "?").padStart(3);
  let row = `${number}  (no answer)`;
  if (hop.address !== null) {
    const isChanged = hop.tos !== null && changesOf(traced).some(({ at }) => at === hop.hop);
    const text = `${markThere(hop, mark, exchange?.arrived)}${isChanged ? "   changed" : ""}`;
    row = `${number}  ${hop.address.padEnd(size)} ${shortTime(hop.milliseconds!).padStart(6)}`;
    const isWide = row.length + 2 + text.length > width;
    row += isWide ? `\n${text.padStart(Math.max(5 + text.length, width))}` : `  ${text}`;
  }
  return isFirst ? `${head}\n${row}\n` : `${row}\n`;
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
  return answer === TIME_EXCEEDED ? there : `${there}; ${answer}`;
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
function isTarget({ answer }: Pick<Hop, "answer">): boolean {
  return answer === "connected" || answer === REFUSED;
}

/** What became of a mark, in a word and in a sentence that begins "it was". */
export function pathOutcome(traced: TracedPath): { sort: string; text: string } {
  const { path, exchange } = traced, { sent = NOT_OBSERVED, arrived, returned } = exchange ?? {};
  if (isDisagreeing(traced)) return { sort: "changed", text: disagreement(path) };
  const places = changesOf(traced).map((change) => {
    const isHere = change.after === 0 && sent.wrong !== null;
    const place = isHere ? "on this host" : placeOf(change, path);
    const behaviour = behaviourText([{ sent: change.from, arrived: change.to }]);
    return `to ${describe(markOf(change.to))} ${place}, ${behaviour}`;
  });
  if (places.length > 0) return { sort: "changed", text: `changed ${places.join(", then ")}` };
  const seen = path.findLast(({ tos }) => tos !== null), end = endOf(traced);
  if (seen === undefined) return { sort: end ?? "not shown", text: unseenText(path) };
  const isWhole = seen.evidence === "server", later = arrived?.changes[0];
  const far = isWhole ? "kept all the way" : `kept as far as ${hopName(seen.hop, path)}`;
  const other = sent.wrong !== null
    ? `the request left this host as ${describe(markOf(sent.wrong))}`
    : isWhole && later
    ? `${later.packet} arrived as ${describe(markOf(later.arrived))}`
    : null;
  if (other !== null) return { sort: "changed", text: `${far} on the SYN, but ${other}` };
  if (!isWhole) {
    const note = end === "rejected"
      ? `and rejected: ${path.at(-1)!.answer}`
      : end === "no answer"
      ? "and nothing behind it answered"
      : "the last that showed it";
    return { sort: end ?? "kept as far as shown", text: `${far}, ${note}` };
  }
  if (returned?.kept === false) {
    const back = `, but the reply came back as ${describe(markOf(returned.arrived!))}`;
    return { sort: "changed on the way back", text: far + back };
  }
  const isAll = arrived != null && coversAllData(arrived, sent);
  const text = isAll ? ": the server reports it" : " on the packets that the server reports";
  return { sort: "kept all the way", text: far + text };
}

/** Whether a router did not let the mark pass, or neither routers nor target answered any more. */
function endOf({ path, exchange }: TracedPath): "rejected" | "no answer" | null {
  const { answer = null } = path.at(-1) ?? {};
  if (answer !== null && answer !== TIME_EXCEEDED && !isTarget({ answer })) return "rejected";
  const isOver = exchange?.failure?.code === Exit.timeout;
  return isOver && !path.some(isTarget) ? "no answer" : null;
}

/** Which hops received which mark. */
function disagreement(path: readonly Hop[]): string {
  const shown = path.filter(({ tos }) => tos !== null);
  const parts = [...Map.groupBy(shown, ({ tos }) => tos! >> 2)].map(([dscp, hops]) =>
    `as ${describe(markOf(dscp << 2))} by ${hopList(hops.map(({ hop }) => hop))}`
  );
  return `received ${parts.join(", ")}: the hops disagree, as if packets took several ways`;
}

/** Numbers of hops, those that follow each other as a range. */
export function hopList(hops: readonly (number | null)[]): string {
  const ranges: [number, number][] = [];
  for (const hop of hops) {
    if (hop === null) continue;
    const range = ranges.at(-1);
    if (range !== undefined && range[1] === hop - 1) range[1] = hop;
    else ranges.push([hop, hop]);
  }
  const numbers = ranges.map(([from, to]) =>
    from === to ? `${from}` : to === from + 1 ? `${from}, ${to}` : `${from} to ${to}`
  ).join(", ");
  const named = numbers === "" ? [] : [`hop${/\D/.test(numbers) ? "s" : ""} ${numbers}`];
  return [...named, ...hops.includes(null) ? ["the target"] : []].join(" and ");
}

/** What is known of a mark that no hop showed. */
function unseenText(path: readonly Hop[]): string {
  const hint = path.findLast(({ evidence }) => evidence === "icmp");
  if (hint !== undefined) {
    return `kept in its lower bits as far as ${hopName(hint.hop, path)}; no more is known`;
  }
  if (path.some(({ answer }) => answer === TIME_EXCEEDED)) {
    return "not shown by the routers that answered";
  }
  return path[0]?.hop === 1 && isTarget(path[0])
    ? "not shown: the first hop is the target, which does not report it"
    : "not seen: no router answered, nothing is known of the path";
}

/** Between which two hops, and which in between do not show the mark. */
export function placeOf({ after, at }: Pick<Change, "after" | "at">, path: readonly Hop[]): string {
  const isBetween = (hop: Hop) => distanceOf(hop) > after && distanceOf(hop) < (at ?? Infinity);
  const unseen = path.filter((hop) => hop.tos === null && isBetween(hop));
  const numbers = unseen.map(({ hop }) => hop).join(", ");
  const state = unseen.some(hasAnswered) ? "unknown" : "silent";
  const note = numbers === "" ? "" : ` (${state} in between: ${numbers})`;
  return `between ${hopName(after, path)} and ${hopName(at, path)}${note}`;
}

/** What is printed last: what became of the marks. @param isMany whether several were asked for */
export function pathReport(all: readonly TracedPath[], isMany: boolean, width: number): string {
  const known = all.filter(({ path }) => isMany || path.length > 0);
  if (known.length === 0) return "";
  const fresh = known.filter(({ isFreshPort }) => isFreshPort);
  const notes = silenceLines(known.flatMap(({ path }) => path));
  if (fresh.length > 0) {
    const marks = known.length > 1 ? ` (${labels(fresh)})` : "";
    notes.push(
      `The target answered only another port than the probes had${marks}, as behind a firewall ` +
        "that lets one SYN of a connection pass.",
    );
  }
  if (isMany) return marksReport(known, notes, width);
  const outcome = `${describe(known[0].mark)} was ${pathOutcome(known[0]).text}.`;
  return wrap([outcome, ...notes].join(" "), width);
}

/** Which hops nearer than the target did not answer, and how long they were given. */
function silenceLines(hops: readonly Hop[]): string[] {
  const end = Math.min(...hops.filter(isTarget).map(distanceOf));
  const silent = byDistance(hops).filter(([distance, same]) =>
    distance < end && !same.some(hasAnswered)
  );
  const longest = ([, same]: typeof silent[number]) =>
    shortSeconds(Math.max(...same.map(({ waited }) => waited ?? 0)));
  return [...Map.groupBy(silent, longest)].map(([waited, some]) =>
    `No answer within ${waited} from ${hopList(some.map(([distance]) => distance))}.`
  );
}

/** Seconds in few characters: `5 s`, `0.2 s`. */
export function shortSeconds(milliseconds: number): string {
  return `${Number((milliseconds / 1000).toPrecision(2))} s`;
}

/** Several marks: a table if it fits, what became of them in words, and how many of each. */
function marksReport(all: readonly TracedPath[], notes: readonly string[], width: number): string {
  const outcomes = all.map((traced) => {
    const { sort: end, text } = pathOutcome(traced), drop = dropText(traced, all);
    const sort = drop !== null && end === "no answer" ? "dropped" : end;
    return { ...traced, sort, text, drop };
  });
  const isInWords = (one: typeof outcomes[number]) =>
    /^rejected$|^changed on/.test(one.sort) ||
    (one.sort === "changed" && (changesOf(one).length === 0 || isDisagreeing(one)));
  const told = [...Map.groupBy(outcomes.filter(isInWords), ({ text }) => text)];
  const sorts = [...Map.groupBy(outcomes, ({ sort }) => sort)];
  const counts = sorts.map(([sort, some]) => {
    const isNamed = sorts.length > 1 && some.length <= 8;
    return `${some.length} ${sort}${isNamed ? ` (${labels(some)})` : ""}`;
  });
  const drops = [...Map.groupBy(outcomes.filter(({ drop }) => drop !== null), ({ drop }) => drop)];
  const lines = [
    ...partlySilentLines(all),
    ...changeLines(all.filter((traced) => !isDisagreeing(traced))),
    ...drops.map(([text, some]) => `${labels(some)} ${some.length > 1 ? "are" : "is"} ${text}.`),
    ...told.map(([text, some]) => `${labels(some)} ${some.length > 1 ? "were" : "was"} ${text}.`),
    ...notes,
    `Of ${plural(all.length, "mark")}: ${counts.join(", ")}.`,
  ];
  return (all.length <= 8 ? hopTable(all, width) : "") +
    lines.map((line) => wrap(line, width)).join("");
}

function labels(all: readonly TracedPath[]): string {
  return all.map(({ mark }) => markLabel(mark)).join(", ");
}

/** Where a mark vanishes and others pass; `null` if it does not. */
function dropText(traced: TracedPath, all: readonly TracedPath[]): string | null {
  if (endOf(traced) !== "no answer") return null;
  const after = traced.path.findLast(hasAnswered)?.hop ?? 0;
  const passing = all.flatMap((other) => {
    const next = other.path.find((hop) => hasAnswered(hop) && distanceOf(hop) > after);
    return other === traced || next === undefined ? [] : [{ ...other, next }];
  });
  if (passing.length === 0) return null;
  const [nearest] = passing.toSorted((a, b) => distanceOf(a.next) - distanceOf(b.next));
  const from = hopName(after, traced.path), to = hopName(nearest.next.hop, nearest.path);
  const others = passing.length > 4 ? `${passing.length} marks` : labels(passing);
  return `dropped between ${from} and ${to}; ${others} ${passing.length > 1 ? "pass" : "passes"}`;
}

/** Where marks were changed, to what, and which behaviour explains all marks there. */
function changeLines(all: readonly TracedPath[]): string[] {
  const changed = all.flatMap((traced) =>
    changesOf(traced).map((change) => ({ ...traced, change, place: placeOf(change, traced.path) }))
  );
  return [...Map.groupBy(changed, ({ place }) => place)].map(([place, here]) => {
    const words = [...Map.groupBy(here, ({ change }) => markLabel(markOf(change.to)))]
      .map(([to, same]) => `${labels(same)} → ${to}`);
    const { after, at } = here[0].change;
    const pairs = all.flatMap(({ mark, path }) => {
      const tosAt = (wanted: number | null) => path.find(({ hop }) => hop === wanted)?.tos ?? null;
      const sent = after === 0 ? mark.tos : tosAt(after), arrived = tosAt(at);
      return sent === null || arrived === null ? [] : [{ sent, arrived }];
    });
    return `B${place.slice(1)}: ${words.join("; ")}, ${behaviourText(pairs)}.`;
  });
}

/** Hops that answered some marks only, of those that passed them. */
function partlySilentLines(all: readonly TracedPath[]): string[] {
  const probed = all.flatMap(({ path }) => {
    const last = path.findLastIndex(hasAnswered);
    return path.filter((hop, at) => hasAnswered(hop) || (hop.waited !== null && at < last));
  });
  return byDistance(probed).flatMap(([distance, same]) => {
    const answered = same.filter(hasAnswered);
    const share = `it answered ${answered.length} of ${same.length} probes`;
    const isPart = answered.length > 0 && answered.length < same.length;
    if (distance === Infinity || !isPart) return [];
    return `Hop ${distance} (${answered[0].address}) is partly silent: ${share}.`;
  });
}

function hasAnswered({ answer }: Hop): boolean {
  return answer !== null;
}

/** How far away a hop is; one at an unknown distance is the farthest. */
function distanceOf({ hop }: Hop): number {
  return hop ?? Infinity;
}

/** What each hop answered to each mark, nearest first. */
function byDistance(hops: readonly Hop[]): [distance: number, same: Hop[]][] {
  return [...Map.groupBy(hops, distanceOf)].toSorted(([a], [b]) => a - b);
}

/** A row for each hop up to the last that answered, a column for each mark; empty if too wide. */
function hopTable(all: readonly TracedPath[], width: number): string {
  const rows = [["hop", "address", ...all.map(({ mark }) => markLabel(mark))]];
  const hops = byDistance(all.flatMap(({ path }) => path));
  const last = hops.findLastIndex(([, same]) => same.some(hasAnswered));
  for (const [distance, same] of hops.slice(0, last + 1)) {
    const addresses = new Set(same.flatMap(({ address }) => address ?? []));
    const [address = "(no answer)", ...others] = addresses;
    const more = others.length > 0 ? ` +${others.length}` : "";
    const number = distance === Infinity ? "?" : `${distance}`;
    const cells = all.map(({ mark, path }) =>
      markCell(path.find((hop) => distanceOf(hop) === distance), mark)
    );
    rows.push([number.padStart(3), `${address}${more}`, ...cells]);
  }
  const widths = rows[0].map((_, at) => Math.max(...rows.map((row) => row[at].length)) + 2);
  if (widths.reduce((sum, each) => sum + each) > width + 2) return "";
  const lineOf = (row: string[]) => row.map((cell, at) => cell.padEnd(widths[at])).join("");
  return rows.map((row) => `${lineOf(row).trimEnd()}\n`).join("");
}

/** What a table says of one mark at one hop. */
function markCell(hop: Hop | undefined, mark: Mark): string {
  if (!hop?.address) return "-";
  if (hop.tos === null) return hop.evidence === "icmp" ? "lower" : "?";
  return sameDscp(hop.tos, mark.tos) ? markLabel(mark) : `${markLabel(markOf(hop.tos))}!`;
}
