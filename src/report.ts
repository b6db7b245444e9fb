/**
 * The report of one request: lines for a person, or a line of JSON.
 *
 * @module
 */

import { formatAddress, hex, type Mark, sameDscp } from "../ffi/mod.ts";
import type { Arrival, Exchange, Path, Reply, Sent, Sink } from "./exchange.ts";
import { Exit, Failure } from "./failure.ts";
import { isSeries, type Options } from "./options.ts";
import { toStandardOutput, widthOf } from "./output.ts";
import { excerpt, plural, wrap } from "./text.ts";
import { coversAllData } from "./verdict.ts";

/** Where a reply goes under these options; a series is for its times, so its bodies are dropped. */
export function sinkFor(options: Options): Sink {
  const isDropped = options.json || options.trace || isSeries(options);
  const bytesOf = (line: string) => Uint8Array.from(line, (c) => c.charCodeAt(0));
  return {
    ...options.include && !isDropped && { head: (line) => toStandardOutput(bytesOf(line)) },
    ...options.fail && { begin: failOnError },
    ...!isDropped && { body: Deno.stdout.isTerminal() ? toTerminal : toStandardOutput },
  };
}

function failOnError({ status, reason }: Reply): void {
  if (status < 400) return;
  const message = excerpt(`the server answered ${status} ${reason}`.trim());
  throw new Failure(Exit.httpError, message);
}

/** @throws {Failure} the body is binary, which curl does not print either */
function toTerminal(piece: Uint8Array): Promise<void> {
  if (!piece.includes(0)) return toStandardOutput(piece);
  const hint = "redirect it, with > FILE or through a pipe";
  throw new Failure(Exit.cannotWrite, "the reply is binary and can mess up a terminal", hint);
}

type Line = readonly [label: string, text: string];

/** What is known as soon as the connection is marked. */
export function markedReport({ connection, mark }: Exchange, isBuiltIn: boolean): string {
  if (connection === null) return "";
  const { localAddr, remoteAddr, fd, readBack } = connection;
  const ends = `${formatAddress(localAddr)} → ${formatAddress(remoteAddr)}`;
  const name = `${mark.name ?? "no name"} = DSCP ${mark.dscp} = byte ${hex(mark.tos)}`;
  return laidOut([
    ["connected", `${ends}${isBuiltIn ? ", the built-in server" : ""}; descriptor ${fd}`],
    ["mark", `${name}; the kernel reads back ${hex(readBack!)}`],
  ]);
}

/** What became of the request, once it is over. */
export function outcomeReport(exchange: Exchange, isBuiltIn: boolean): string {
  const { connection, sent, arrived, reply, milliseconds, failure, markSyn } = exchange;
  if (connection === null) return "";
  const lines: Line[] = [];
  // A TLS handshake that fails takes the descriptor with it, before anything could be read.
  if (sent.packets.length > 0 || reply !== null) lines.push(["sent", sentText(sent)]);
  // That the built-in server saw an unmarked handshake is in the last line.
  const isWorthShowing = arrived !== null &&
    (arrived.kept !== null || arrived.isOther || !isBuiltIn);
  if (isWorthShowing) lines.push(["arrived", arrivedText(arrived, sent)]);
  // With -f the body of an error is left unread.
  const isTruncated = reply?.complete === false && failure?.code !== Exit.httpError;
  if (reply !== null) lines.push(["reply", replyText(reply, milliseconds.total!, isTruncated)]);
  lines.push(["handshake", handshakeText(markSyn, arrived)]);
  return laidOut(lines);
}

/** Lines with their labels, as wide as standard error allows, in colours on a terminal. */
function laidOut(lines: readonly Line[]): string {
  const INDENT = 11, width = widthOf(Deno.stderr) - INDENT;
  const isColored = Deno.stderr.isTerminal() && !Deno.noColor;
  const colored = (code: number, text: string) => isColored ? `\x1b[${code}m${text}\x1b[0m` : text;
  return lines.map(([label, text]) => {
    const wrapped = text.split("\n").map((line) => wrap(line, width)).join("").trimEnd();
    return colored(1, label.padEnd(INDENT)) +
      wrapped.replaceAll("\n", `\n${" ".repeat(INDENT)}`)
        .replace(/\bproved(?= by|$|\n)/, (word) => colored(32, word))
        .replace(/NOT the mark/, (words) => colored(31, words)) +
      "\n";
  }).join("");
}

function sentText({ proved, packets, bytes, outerTos, takenBy }: Sent): string {
  if (packets.length === 0) {
    return "not observed: no copy came back; the device may not make any, NAT may\n" +
      "hide them, or sysctl net.core.tstamp_allow_data is 0";
  }
  const marks = [...new Set(packets.map(({ tos }) => hex(tos)))].join(" and ");
  const seen = `${plural(packets.length, "packet")} with ${marks}`;
  const tunnel = `, inside a tunnel\nwhose packets carry ${outerTos === null ? "" : hex(outerTos)}`;
  const where = `, read from the IP header${outerTos === null ? "" : tunnel}`;
  const isEcn = packets.some(({ tos }) => (tos & 3) !== 0);
  const ecn = isEcn ? "\n(its two lowest bits are ECN, which TCP sets by itself)" : "";
  if (proved === false) return `${seen}${where}: NOT the mark that was set${ecn}`;
  if (takenBy !== null) {
    return `${seen}, handed to ${takenBy}, whose own packets are not observed${ecn}`;
  }
  if (proved === null) {
    return `${seen}: proved for ${bytes.seen} of ${bytes.sent ?? "?"} bytes${ecn}`;
  }
  return `${seen}${where}: proved${ecn}`;
}

function arrivedText(arrived: Arrival, sent: Sent): string {
  const { syn, ack, data, isOther, kept } = arrived;
  const reported = Object.entries({ SYN: syn, ACK: ack, data }).filter(([, tos]) => tos !== null);
  const bytes = reported.map(([packet, tos]) => `${packet} ${hex(tos!)}`).join(", ");
  if (isOther) {
    return `${bytes}, reported by the server for another connection:\na proxy or NAT in between`;
  }
  if (kept === null) {
    return `${bytes} at the server; whether the mark arrived is unknown without --mark-syn`;
  }
  const where = coversAllData(arrived, sent) ? "the path" : "on these packets";
  const survived = `the mark survived ${where}`;
  return `${bytes} at the server: ${kept ? survived : "NOT the mark that was sent"}`;
}

function handshakeText(markedSyn: boolean, arrived: Arrival | null): string {
  const { isOther = false, changed = null } = arrived ?? {};
  const confirmed = arrived !== null && !isOther ? arrived.syn ?? arrived.ack : null;
  if (!markedSyn && changed !== null && changed.packet !== "data") {
    return `sent unmarked, but ${changed.packet} arrived with ${hex(changed.arrived)}`;
  }
  if (!markedSyn && confirmed !== null && sameDscp(confirmed, 0)) {
    return `unmarked, as the server confirms (${hex(confirmed)}); --mark-syn marks it too`;
  }
  if (!markedSyn) {
    return "unmarked: SYN and ACK leave before the mark is set; --mark-syn marks them";
  }
  const proved = arrived?.handshake ?? null;
  if (isOther) return "set before the SYN; not proved: a proxy or NAT is in between";
  if (proved === null) return "set before the SYN; not proved (--serve at the far end reports it)";
  const verdict = proved ? "proved by the mark" : "NOT the mark";
  return `set before the SYN; ${verdict} that the server reports`;
}

function replyText(reply: Reply, total: number, isTruncated: boolean): string {
  const { status, reason, headers, tos, bodyBytes } = reply;
  const location = headers.find(([name]) => name === "location")?.[1];
  const isRedirect = location !== undefined && status >= 300 && status < 400;
  const size = `${isTruncated ? "only " : ""}${plural(bodyBytes, "byte")} in ${
    total.toFixed(1)
  } ms`;
  const marked = tos === null ? "" : `, its packets marked ${hex(tos)}`;
  const leads = isRedirect ? `; leads to ${excerpt(location)}, not followed` : "";
  return `${excerpt(`${status} ${reason}`.trim())}, ${size}${marked}${leads}`;
}

/** What a line of JSON may hold besides an exchange. */
interface JsonContext {
  /** Whether the server is this process; `null` if no request was made. */
  readonly isBuiltIn?: boolean;
  /** Which round of a series it is, from 1. */
  readonly round?: number;
  /** What a trace found, and where it went. */
  readonly path?: Path;
  /** See {@linkcode JsonContext.path}. */
  readonly url?: string;
}

/** The exchange as one line of JSON, in the form that the README describes. */
export function json(
  exchange: Exchange | null,
  failure: Failure | null,
  { isBuiltIn, round, path, url }: JsonContext = {},
): string {
  return jsonLine({
    ...round !== undefined && { round },
    ...exchange && exchangeObject(exchange, isBuiltIn ?? false),
    ...path && !exchange && { url, mark: path.mark },
    ...path && { path: path.path, changed: path.changes[0] ?? null },
    ...failure && { error: { code: failure.code, message: failure.message } },
  });
}

function exchangeObject(exchange: Exchange, isBuiltIn: boolean) {
  const { target, connection, mark, markSyn, sent, arrived, reply, milliseconds } = exchange;
  const end = (address: Deno.NetAddr | undefined) =>
    address === undefined ? null : { address: address.hostname, port: address.port };
  const { tos, trailers, ...plain } = reply ?? {};
  return {
    url: target.url,
    server: isBuiltIn ? "built-in" : "remote",
    local: end(connection?.localAddr),
    remote: end(connection?.remoteAddr),
    mark: {
      ...mark,
      readBack: connection?.readBack ?? null,
      handshake: connection && markSyn,
      handshakeProved: arrived?.handshake ?? null,
    },
    sent: {
      proved: sent.proved,
      bytes: sent.bytes,
      outerTos: sent.outerTos,
      packets: sent.packets.map(({ tos, length }) => ({ tos, length })),
    },
    // What arrived on another connection says nothing of this one.
    arrived: arrived?.isOther === false
      ? { syn: arrived.syn, ack: arrived.ack, data: arrived.data }
      : null,
    reply: reply && {
      ...plain,
      ...trailers!.length > 0 && { trailers },
      ...tos !== null && { tos },
    },
    milliseconds,
  };
}

/** A line of JSON: fractions to six digits; what would act on a terminal is escaped. */
export function jsonLine(object: unknown): string {
  const rounded = (_: string, value: unknown) =>
    typeof value === "number" && value % 1 !== 0 ? Number(value.toPrecision(6)) : value;
  // JSON.stringify leaves DEL, C1 and direction marks as they are.
  return JSON.stringify(object, rounded).replace(
    /[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
  ) + "\n";
}

/** A mark in a table. */
export function markLabel({ name, dscp }: Mark): string {
  return name ?? String(dscp);
}
