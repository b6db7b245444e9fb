/**
 * The report of one request: lines for a person, or a line of JSON.
 *
 * @module
 */

import { hex, type Mark, sameDscp } from "../ffi/dscp.ts";
import { formatAddress } from "../ffi/sockaddr.ts";
import type { Arrival, Exchange, Path, Reply, Returned, Sent } from "./exchange.ts";
import { behaviours } from "./behaviour.ts";
import { Exit, type Failure } from "./failure.ts";
import { isColored, NotPrinted, widthOf } from "./output.ts";
import { excerpt, plural, printable, wrap } from "./text.ts";
import { coversAllData } from "./verdict.ts";

/** Words of a line that have a colour on a terminal. */
const GOOD = { words: "proved", code: 32 }, BAD = { words: "NOT the mark", code: 31 };

type Line = readonly [label: string, text: string, colored?: typeof GOOD | null];

/** What is known as soon as the connection is marked. */
export function markedReport({ connection, mark }: Exchange, isBuiltIn: boolean): string {
  if (connection === null) return "";
  const { localAddr, remoteAddr, readBack } = connection;
  const ends = `${formatAddress(localAddr)} → ${formatAddress(remoteAddr)}`;
  const name = `${mark.name ?? "no name"} = DSCP ${mark.dscp} = byte ${hex(mark.tos)}`;
  return laidOut([
    ["connected", `${ends}${isBuiltIn ? ", the built-in server" : ""}`],
    ["mark", `${name}; the kernel reads back ${hex(readBack!)}`],
  ]);
}

/** What became of the request, once it is over. */
export function outcomeReport(exchange: Exchange): string {
  const { connection, sent, arrived, reply, markSyn } = exchange;
  if (connection === null) return "";
  const lines: Line[] = [];
  // A TLS handshake that fails takes the descriptor with it, before anything could be read.
  if (sent.packets.length > 0 || reply !== null) {
    const text = sentText(sent, sent.packets.length > 0 ? null : connection.device);
    lines.push(["sent", text, sent.proved === null ? null : sent.proved ? GOOD : BAD]);
  }
  if (arrived !== null) {
    lines.push(["arrived", arrivedText(exchange, arrived), arrived.kept === false ? BAD : null]);
  }
  if (reply !== null) {
    lines.push([
      "reply",
      replyText(exchange, reply),
      exchange.returned.kept === false ? BAD : null,
    ]);
  }
  if (arrived === null) {
    const text = markSyn
      ? "set before the SYN; not proved (--serve at the far end reports it)"
      : "unmarked: it is sent before the mark is set; --mark-syn marks it too";
    lines.push(["handshake", text]);
  }
  return laidOut(lines);
}

/** Lines with their labels, as wide as standard error allows, in colours on a terminal. */
function laidOut(lines: readonly Line[]): string {
  const INDENT = 11, width = widthOf(Deno.stderr) - INDENT;
  const hasColors = isColored(Deno.stderr);
  const inColor = (code: number, text: string) => hasColors ? `\x1b[${code}m${text}\x1b[0m` : text;
  return lines.map(([label, text, colored]) => {
    const wrapped = text.split("\n").map((line) => wrap(line, width)).join("").trimEnd();
    const shown = wrapped.replaceAll("\n", `\n${" ".repeat(INDENT)}`);
    // The reason that a server gives may hold these words too, in front of ours.
    const at = colored ? shown.lastIndexOf(colored.words) : -1;
    const marked = at < 0 ? shown : shown.slice(0, at) +
      inColor(colored!.code, colored!.words) + shown.slice(at + colored!.words.length);
    return `${inColor(1, label.padEnd(INDENT))}${marked}\n`;
  }).join("");
}

/** @param device the interface that has this end's address; `null` if none has */
function sentText(
  { proved, packets, repeats, bytes, outerTos, takenBy }: Sent,
  device: string | null,
): string {
  if (packets.length === 0) {
    const own = device === null ? "" : ` (the address is ${printable(device)}'s)`;
    return `not observed: the kernel returned no copies${own}. Known reasons: ` +
      "WireGuard, IPsec, MACsec, macvlan siblings, Multipath TCP, a driver without TX " +
      "timestamps (VMware's vmxnet3), NAT on this host, or net.core.tstamp_allow_data=0";
  }
  const marks = [...new Set(packets.map(({ tos }) => hex(tos)))].join(" and ");
  const again = repeats === 0 ? "" : `, ${repeats} of them sent again`;
  const seen = `${plural(packets.length, "packet")} with ${marks}${again}`;
  const tunnel = `, inside a tunnel\nwhose packets carry ${outerTos === null ? "" : hex(outerTos)}`;
  const its = packets.length === 1 ? "its" : "their";
  const where = `, read from ${its} IP header${packets.length === 1 ? "" : "s"}` +
    (outerTos === null ? "" : tunnel);
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

function arrivedText({ sent, mark, markSyn, expect }: Exchange, arrived: Arrival): string {
  const { syn, ack, data, isOther, nat, kept, changes, ecn } = arrived;
  const reported = Object.entries({ request: data, SYN: syn, ACK: data === null ? ack : null })
    .flatMap(([packet, tos]) => tos === null ? [] : [`${packet} ${hex(tos)}`]);
  if (isOther) {
    return `${reported.join(", ")} on another connection: a proxy is in between, or a firewall ` +
      "that changes sequence numbers";
  }
  const through = nat === null ? "" : `\nthrough NAT: the server sees ${excerpt(nat)}`;
  const bits = ecn === null ? "" : `\nECN ${ecn} on the way`;
  if (kept === null) {
    return `${reported.join(", ")} at the server; whether the mark arrived is unknown:\n` +
      `it reports the handshake only, and --mark-syn marks that${through}`;
  }
  const isAll = coversAllData(arrived, sent);
  const part = isAll ? "" : data === null ? " on the handshake" : " on the packet that is reported";
  // An outer header with another mark is what the path has seen.
  const isHidden = sent.outerTos !== null && !sameDscp(sent.outerTos, mark.tos);
  const survived = expect !== null
    ? "as expected"
    : isHidden
    ? "the mark inside the tunnel survived"
    : `the mark survived${part}`;
  const isSynAsSent = !markSyn && syn !== null && sameDscp(syn, 0) && data !== null;
  const [shown, rest] = isSynAsSent
    ? [reported.slice(0, 1), `; SYN ${hex(syn)}, as it was sent\n(--mark-syn marks it too)`]
    : [reported, ""];
  const verdict = changes.length === 0
    ? survived
    : `NOT the mark that ${expect === null ? "was sent" : "is expected"}`;
  return `${shown.join(", ")}: ${verdict}${rest}${bits}${through}`;
}

function replyText(exchange: Exchange, reply: Reply): string {
  const { connection, returned, milliseconds, failure } = exchange;
  const { status, reason, headers, bodyBytes } = reply;
  const location = headers.find(([name]) => name === "location")?.[1];
  const isRedirect = location !== undefined && status >= 300 && status < 400;
  // With -f the body of an error is left unread.
  const isRefused = failure instanceof NotPrinted;
  const isAll = headers.some((field) => `${field}` === `content-length,${bodyBytes}`);
  const isTruncated = !reply.complete && failure?.code !== Exit.httpError && !(isRefused && isAll);
  const size = plural(bodyBytes, "byte"), time = `${milliseconds.total!.toFixed(1)} ms`;
  const leads = isRedirect ? `; leads to ${excerpt(location)}, not followed` : "";
  return `${excerpt(`${status} ${reason}`.trim())}, ${isTruncated ? "only " : ""}${size}${
    isRefused ? ", not printed," : ""
  } in ${time}` +
    returnedText(returned, connection!.remoteAddr) + leads;
}

function returnedText({ sent, arrived, kept }: Returned, { hostname }: Deno.NetAddr): string {
  if (kept === false) {
    return `, sent with ${hex(sent!)}, came back with ${hex(arrived!)}: ` +
      "NOT the mark that the server sent";
  }
  // Within one host there is no way back to speak of.
  if (sent !== null && /^127\.|^::1$/.test(hostname)) return "";
  if (arrived !== null) return `, its first packet marked ${hex(arrived)}`;
  return sent === null ? "" : `, sent with ${hex(sent)} (only root sees what came back)`;
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
  const { target, connection, mark, markSyn, expect, sent, arrived, returned, reply } = exchange;
  const end = (address: Deno.NetAddr | undefined) =>
    address === undefined ? null : { address: address.hostname, port: address.port };
  const { tos, trailers, ...plain } = reply ?? {};
  return {
    time: new Date(performance.timeOrigin + exchange.started).toISOString(),
    url: target.url,
    server: isBuiltIn ? "built-in" : "remote",
    local: end(connection?.localAddr),
    remote: end(connection?.remoteAddr),
    descriptor: connection?.fd ?? null,
    mark: {
      ...mark,
      readBack: connection?.readBack ?? null,
      handshake: connection && markSyn,
      handshakeProved: arrived?.handshake ?? null,
    },
    ...expect && { expect },
    sent: {
      proved: sent.proved,
      bytes: sent.bytes,
      repeats: sent.repeats,
      outerTos: sent.outerTos,
      handedTo: sent.takenBy,
      packets: sent.packets.map(({ tos, length }) => ({ tos, length })),
    },
    // What arrived on another connection says nothing of this one.
    arrived: arrived?.isOther === false
      ? {
        ...{ syn: arrived.syn, ack: arrived.ack, data: arrived.data },
        ...{ kept: arrived.kept, nat: arrived.nat, ecn: arrived.ecn },
        behaviour: behaviours(arrived.changes).map(({ name }) => name),
      }
      : null,
    returned,
    reply: reply && {
      ...plain,
      ...trailers!.length > 0 && { trailers },
      ...tos !== null && { tos },
    },
    milliseconds: exchange.milliseconds,
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
