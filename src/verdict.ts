/**
 * Did the mark leave, did it arrive, did it come back; which failure follows. Each question is
 * answered once, by a pure function of what was observed; report, JSON, tables and exit codes use
 * its value.
 *
 * @module
 */

import type { MarkedConn } from "../ffi/conn.ts";
import { describe, hex, type Mark, markOf, sameDscp } from "../ffi/dscp.ts";
import type { SentPacket } from "../ffi/sent.ts";
import { formatAddress } from "../ffi/sockaddr.ts";
import { encode, familyOf, sameEnd } from "../ffi/sockaddr.ts";
import { behaviours, behaviourText, consequence, TELLING_MARKS } from "./behaviour.ts";
import type {
  Arrival,
  ArrivedChange,
  Exchange,
  Reply,
  RequestOptions,
  Returned,
  Sent,
} from "./exchange.ts";
import { Exit, Failure } from "./failure.ts";
import type { Target } from "./target.ts";
import { plural } from "./text.ts";

// ─── Did it leave? ──────────────────────────────────────────────────────────────────────────────

/** What is known before anything was sent, and if no copy came back. */
export const NOT_OBSERVED: Sent = {
  proved: null,
  packets: [],
  repeats: 0,
  bytes: { seen: 0, sent: 0 },
  wrong: null,
  outerTos: null,
  takenBy: null,
};

/** A request of which nothing is known yet; it begins now, unless another time is given. */
export function newExchange(
  target: Target,
  mark: Mark,
  { markSyn, expect }: Pick<RequestOptions, "markSyn" | "expect">,
  started: number = performance.now(),
): Exchange {
  return {
    ...{ target, mark, markSyn, expect, started, connection: null, reply: null },
    milliseconds: { connect: null, firstByte: null, total: null },
    sent: NOT_OBSERVED,
    arrived: null,
    returned: { sent: null, arrived: null, kept: null },
    failure: null,
  };
}

/** What of an exchange decides how its packets should look. */
type Asked = Pick<Exchange, "target" | "mark" | "expect">;

/**
 * Did the mark leave? All bytes of data must have been seen, in packets with the mark, or with the
 * one that is expected: a rule of this host may set it.
 */
export function assessSent(
  { sent: packets, dataSent: sent, remoteAddr }: Pick<
    MarkedConn,
    "sent" | "dataSent" | "remoteAddr"
  >,
  { target, mark, expect }: Asked,
): Sent {
  const isWrong = (tos: number) =>
    !sameDscp(tos, mark.tos) && !(expect !== null && sameDscp(tos, expect.tos));
  const wrong = packets.map(({ tos }) => tos).find(isWrong) ?? null;
  const outer = packets.flatMap(({ outerTos }) => outerTos ?? []);
  const outerTos = outer.find(isWrong) ?? outer[0] ?? null;
  const isRedirected = packets.some((packet) => packet.isRedirected) ||
    !isAsked(target, remoteAddr);
  const takenBy = isRedirected
    ? "a program on this host"
    : packets.some(({ linkHeader }) => linkHeader === 0)
    ? "a tunnel device"
    : packets.some(({ isWrapped, outerTos }) => isWrapped && outerTos === null)
    ? "a tunnel"
    : null;
  const { seen, repeats } = bytesCovered(packets);
  const isWhole = packets.length > 0 && sent !== null && seen >= sent && takenBy === null;
  const proved = wrong !== null || outer.some(isWrong) ? false : isWhole ? true : null;
  return { proved, packets, repeats, bytes: { seen, sent }, wrong, outerTos, takenBy };
}

/** Whether a connection leads where a URL says; a BPF program may have sent it elsewhere. */
function isAsked({ host, port }: Target, remoteAddr: Deno.NetAddr): boolean {
  const isUnspecified = /^(0\.0\.0\.0|::)$/.test(host);
  if (familyOf(host) === null || isUnspecified) return port === remoteAddr.port;
  return sameEnd(encode({ transport: "tcp", hostname: host, port }), encode(remoteAddr));
}

/** Bytes of data in packets, each counted once, and how many packets brought none that was new. */
export function bytesCovered(packets: readonly SentPacket[]): { seen: number; repeats: number } {
  // Sequence numbers wrap around (RFC 9293 section 3.4), so they count from the first.
  const first = packets[0]?.sequence ?? 0;
  const runs = packets.map(({ sequence, payload }) => ({ from: sequence - first | 0, payload }));
  let seen = 0, repeats = 0, end = -Infinity;
  for (const { from, payload } of runs.sort((a, b) => a.from - b.from)) {
    const more = Math.max(0, from + payload - Math.max(end, from));
    if (more === 0 && payload > 0) repeats++;
    seen += more;
    end = Math.max(end, from + payload);
  }
  return { seen, repeats };
}

// ─── Did it arrive? ─────────────────────────────────────────────────────────────────────────────

/** What a header of a reply of our own server says: a byte, as `0xB8`; `null` if it is no byte. */
function byteOf(reply: Reply, name: string): number | null {
  const value = valueOf(reply, name);
  return /^0x[0-9A-Fa-f]{2}$/.test(value) ? Number(value) : null;
}

function valueOf({ headers }: Reply, wanted: string): string {
  return headers.find(([name]) => name === wanted)?.[1] ?? "";
}

/**
 * Did packets arrive as they were sent? An unmarked handshake was sent with 0. The server's report
 * is about this connection if it saw our sequence number, which NAT keeps and a proxy does not, or,
 * if that is unknown, our address.
 */
export function assessArrival(
  { reply, mark, markSyn, expect, sent: { packets: seen, bytes } }: Pick<
    Exchange,
    "reply" | "mark" | "markSyn" | "expect" | "sent"
  >,
  localAddr: Deno.NetAddr,
): Arrival | null {
  if (reply === null) return null;
  const [syn, ack, data] = ["syn", "ack", "data"].map((name) => byteOf(reply, `arrived-${name}`));
  if (syn === null && ack === null && data === null) return null;
  const peer = valueOf(reply, "arrived-peer");
  const isSamePeer = peer === "" || peer === formatAddress(unmapIPv4(localAddr));
  const isOther =
    !(hasSequence(valueOf(reply, "arrived-sequence"), seen, bytes.sent) ?? isSamePeer);
  // A rule of this host may have set what is expected.
  const asSent = expect === null ? mark.tos : (seen[0]?.tos ?? mark.tos) & 0xfc;
  const first = markSyn ? mark.tos : 0;
  // A marked request may overtake an unmarked ACK, and end the handshake in its place.
  const isRequest = !markSyn && ack !== null && sameDscp(ack, mark.tos);
  const reported = [
    ["SYN", first, syn],
    ["ACK", first, isRequest ? null : ack],
    ["data", asSent, data],
  ] as const;
  const isMarked = (packet: ArrivedChange["packet"]) => markSyn || packet === "data";
  const packets = reported.flatMap(([packet, sent, arrived]) =>
    isOther || arrived === null
      ? []
      : [{ packet, sent, wanted: isMarked(packet) ? expect?.tos ?? sent : sent, arrived }]
  );
  // A rule that sets what is expected may mark the handshake as well.
  const changes = packets.filter(({ wanted, arrived }) =>
    !sameDscp(arrived, wanted) && !(expect !== null && sameDscp(arrived, expect.tos))
  );
  const marked = packets.filter(({ packet }) => isMarked(packet));
  const isChangedEarly = changes.some(({ packet }) => packet !== "data");
  return {
    syn,
    ack,
    data,
    isOther,
    nat: isOther || isSamePeer || !/^\[?[\da-f.:]+\]?:\d{1,5}$/i.test(peer) ? null : peer,
    marked: marked.map(({ arrived }) => arrived),
    kept: changes.length > 0 ? false : marked.length > 0 ? true : null,
    changes,
    handshake: !markSyn || isOther ? null : isChangedEarly ? false : syn !== null ? true : null,
    ecn: isOther || data === null ? null : ecnChange(seen, data),
  };
}

/**
 * Whether a reported initial sequence number is that of the packets seen; `null` if one is unknown.
 * The first data is one behind it (RFC 9293 section 3.4), and the first copies may be lost.
 */
function hasSequence(
  reported: string,
  packets: readonly SentPacket[],
  sent: number | null,
): boolean | null {
  const isNumber = /^\d{1,10}$/.test(reported) && Number(reported) < 2 ** 32;
  if (!isNumber || packets.length === 0) return null;
  return (packets[0].sequence - 1 - Number(reported)) >>> 0 <= (sent ?? 0);
}

/** What became of ECN bits that all packets seen had in common (RFC 3168 section 5). */
function ecnChange(packets: readonly SentPacket[], arrived: number): Arrival["ecn"] {
  const [before, ...others] = new Set(packets.map(({ tos }) => tos & 3));
  const after = arrived & 3;
  if (before === undefined || others.length > 0 || before === 0 || before === after) return null;
  return after === 0 ? "bleached" : after === 3 ? "congestion experienced" : "mangled";
}

/**
 * Whether all data is reported. A server on IPv4 knows the byte of the first packet of the request,
 * one on IPv6 that of the latest.
 */
export function coversAllData({ data }: Arrival, { packets, repeats }: Sent): boolean {
  return data !== null && packets.length - repeats === 1;
}

/** One end of a connection, IPv4-mapped addresses as IPv4. */
export function unmapIPv4({ hostname, port }: Deno.NetAddr): Deno.NetAddr {
  return { transport: "tcp", hostname: hostname.replace(/^::ffff:(?=[\d.]+$)/, ""), port };
}

// ─── Did it come back? ──────────────────────────────────────────────────────────────────────────

/** Did the reply arrive with the mark that the server gave it? */
export function assessReturn(reply: Reply | null, arrived: Arrival | null): Returned {
  // A proxy makes packets of its own; without a report of what arrived nobody knows of one.
  const isOurs = reply !== null && arrived !== null && !arrived.isOther;
  const sent = isOurs ? byteOf(reply, "reply-tos") : null;
  const tos = reply?.tos ?? null;
  const kept = sent === null || tos === null ? null : sameDscp(sent, tos);
  return { sent, arrived: tos, kept };
}

// ─── Which failure follows? ─────────────────────────────────────────────────────────────────────

/** 101 or 102, if packets left, arrived or came back with another mark. */
function markFailure({ mark, sent, arrived, returned }: Exchange): Failure | null {
  if (sent.wrong !== null) {
    const message = `set ${hex(mark.tos)}, left with ${hex(sent.wrong)}: ` +
      "something on this host, such as nftables, rewrote it";
    return new Failure(Exit.sentChanged, message);
  }
  if (sent.proved === false) {
    const message = `set ${hex(mark.tos)}, left inside a tunnel whose packets carry ` +
      hex(sent.outerTos!);
    const hint = "a tunnel has to copy the mark: VXLAN does with 'tos inherit', ip-link(8)";
    return new Failure(Exit.sentChanged, message, hint);
  }
  if (arrived !== null && arrived.changes.length > 0) {
    return arrivalFailure(arrived, sent.proved === true);
  }
  if (returned.kept !== false) return null;
  const [before, after] = [returned.sent!, returned.arrived!].map((tos) => describe(markOf(tos)));
  return new Failure(Exit.arrivedChanged, `the reply was sent ${before}, came back ${after}`);
}

/** 102. The handshake was not observed leaving, so this host may have changed it. */
function arrivalFailure({ changes, syn, data }: Arrival, hasLeft: boolean): Failure {
  // The request's own change says most.
  const { packet, sent, wanted, arrived } = changes.find((each) => each.packet === "data") ??
    changes[0];
  const what = packet === "data" ? "" : `${packet} `;
  if (wanted !== sent) {
    const [before, expected, after] = [sent, wanted, arrived].map((tos) => describe(markOf(tos)));
    const message = `${what}sent ${before}, arrived ${after}, expected ${expected}`;
    return new Failure(Exit.arrivedChanged, message);
  }
  if (packet === "ACK" && syn !== null && sameDscp(sent, 0)) {
    // With a SYN-ACK that was sent again, the server cannot tell one from the other.
    const message =
      `the ACK or the request arrived with ${describe(markOf(arrived))}, and neither ` +
      "was sent so: rewritten by this host or the path";
    return new Failure(Exit.arrivedChanged, message);
  }
  const change = `sent ${describe(markOf(sent))}, arrived ${describe(markOf(arrived))}`;
  const isDataKept = data !== null && changes.every((each) => each.packet !== "data");
  if (isDataKept && hasLeft) {
    const cause = sameDscp(sent, 0)
      ? "it was marked on its way out of this host, or on the path"
      : "a SYN proxy on the path makes one of its own, or a rule changes SYNs only";
    return new Failure(
      Exit.arrivedChanged,
      `${packet} ${change}, but the request kept its mark: ${cause}`,
    );
  }
  const cause = hasLeft && packet === "data"
    ? "the path rewrote it"
    : "rewritten by this host or the path";
  const pair = { sent, arrived };
  const likeness = sameDscp(sent, 0) ? "" : `, ${behaviourText([pair])}`;
  const isByFirst = packet === "data" && changes.length === 1 && sameDscp(arrived, 0);
  const hint = isByFirst
    ? "a box may classify a connection by its first packet: try --mark-syn"
    : consequence(pair) ??
      (behaviours([pair]).length > 1
        ? `-d ${TELLING_MARKS} shows which of these it is`
        : undefined);
  return new Failure(Exit.arrivedChanged, `${what}${change}: ${cause}${likeness}`, hint);
}

/** What went wrong, all in all: a wrong mark is more than what else happened to the request. */
export function requestFailure(
  exchange: Exchange,
  options: Pick<RequestOptions, "requireProof">,
): Failure | null {
  const { failure, target, reply } = exchange, wrong = markFailure(exchange);
  if (failure === null) return wrong ?? (options.requireProof ? proofFailure(exchange) : null);
  // An interrupt, or what keeps this program from working, is about the run, not the request.
  const isRun = failure.code >= Exit.notMarked || failure.code === Exit.cannotWrite;
  const isClosed = failure.code === Exit.emptyReply || failure.code === Exit.connectionLost;
  if (wrong === null && isClosed && reply === null && isLikelyTls(target)) {
    return new Failure(failure.code, failure.message, "the server may speak TLS: is it https://?");
  }
  if (wrong === null) return droppedFailure(exchange, failure) ?? failure;
  if (isRun) return failure;
  const both = new Failure(wrong.code, `${wrong.message}; ${failure.message}`, wrong.hint);
  both.cause = failure;
  return both;
}

/** Says of a request without an answer how often it was sent, and what to compare it with. */
function droppedFailure(exchange: Exchange, failure: Failure): Failure | null {
  const { target, connection, sent, mark, markSyn, reply } = exchange;
  if (failure.code !== Exit.timeout || reply !== null || mark.tos === 0) return null;
  // With a name, looking it up may have taken the time.
  if (markSyn && connection === null && familyOf(target.host) !== null) {
    const hint = `the path may drop marked SYNs: try without --mark-syn, or ` +
      `--mark-syn -d ${mark.name ?? mark.dscp},DF`;
    return new Failure(failure.code, failure.message, hint);
  }
  if (markSyn || sent.repeats === 0) return null;
  const message = `${failure.message}: the unmarked handshake passed, but the request with ` +
    `${describe(mark)} got no answer, and ${plural(sent.repeats, "packet")} of it ` +
    `${sent.repeats === 1 ? "was" : "were"} sent again`;
  return new Failure(
    failure.code,
    message,
    `the path may drop it: -d ${mark.name ?? mark.dscp},DF`,
  );
}

/** Which of two failures of a run to end with: the earlier one, or a wrong mark behind another. */
export function moreSevere(earlier: Failure | null, later: Failure | null): Failure | null {
  return earlier === null || (isWrongMark(later) && !isWrongMark(earlier)) ? later : earlier;
}

/** Whether packets left, arrived or came back with another mark. */
export function isWrongMark(failure: Failure | null): boolean {
  return failure?.code === Exit.sentChanged || failure?.code === Exit.arrivedChanged;
}

/** Whether http is asked of a port that is usually for https. */
function isLikelyTls({ isHttps, port }: Target): boolean {
  return !isHttps && /443$/.test(String(port));
}

/** 104: of what left, and, if the far end is our own, of what arrived, not all was proved. */
function proofFailure({ sent, arrived, reply, expect }: Exchange): Failure | null {
  const { proved, packets, bytes, takenBy, repeats } = sent;
  const message = packets.length === 0
    ? "no packet was observed leaving"
    : takenBy !== null
    ? `the packets were handed to ${takenBy}`
    : proved === null
    ? `only ${bytes.seen} of ${bytes.sent ?? "?"} bytes were observed leaving`
    : !isOurs(reply) && expect === null
    ? null
    : arrived === null
    ? "the far end does not report what arrived"
    : arrived.isOther
    ? "the far end reports what arrived on another connection: a proxy is in between, or a " +
      "firewall that changes sequence numbers"
    : arrived.data === null
    ? "the far end does not report with which mark the request arrived"
    : coversAllData(arrived, sent)
    ? null
    : `the far end reports what arrived for 1 of ${packets.length - repeats} packets`;
  return message === null ? null : new Failure(Exit.notProved, message);
}

/** Whether the far end is one of ours. */
export function isOurs(reply: Reply | null): boolean {
  return reply !== null && valueOf(reply, "server").startsWith("dscp-get/");
}
