/**
 * Did the mark leave, did it arrive; which failure follows. Each question is answered once, by a pure
 * function of what was observed; report, JSON, tables and exit codes use its value.
 *
 * @module
 */

import {
  describe,
  formatAddress,
  hex,
  type Mark,
  type MarkedConn,
  markOf,
  sameDscp,
  type SentPacket,
} from "../ffi/mod.ts";
import type { Arrival, Exchange, Reply, RequestOptions, Sent } from "./exchange.ts";
import { Exit, Failure } from "./failure.ts";
import type { Target } from "./target.ts";

/** What is known before anything was sent, and if no copy came back. */
export const NOT_OBSERVED: Sent = {
  proved: null,
  packets: [],
  bytes: { seen: 0, sent: 0 },
  wrong: null,
  outerTos: null,
  takenBy: null,
};

/**
 * Did the mark leave? All bytes of data must have been seen, in packets with the mark.
 *
 * @param isOther whether the peer is not the URL's address
 */
export function assessSent(
  { sent: packets, dataSent: sent }: Pick<MarkedConn, "sent" | "dataSent">,
  mark: Mark,
  isOther = false,
): Sent {
  const isWrong = (tos: number) => !sameDscp(tos, mark.tos);
  const wrong = packets.map(({ tos }) => tos).find(isWrong) ?? null;
  const outer = packets.flatMap(({ outerTos }) => outerTos ?? []);
  const outerTos = outer.find(isWrong) ?? outer[0] ?? null;
  const takenBy = packets.some(({ linkHeader }) => linkHeader === 0)
    ? "a tunnel device"
    : packets.some(({ isWrapped, outerTos }) => isWrapped && outerTos === null)
    ? "a tunnel"
    : isOther
    ? "another address than the URL's"
    : packets.some(({ isRedirected }) => isRedirected)
    ? "a program on this host"
    : null;
  const seen = bytesCovered(packets);
  const isWhole = packets.length > 0 && sent !== null && seen >= sent && takenBy === null;
  const proved = wrong !== null || outer.some(isWrong) ? false : isWhole ? true : null;
  return { proved, packets, bytes: { seen, sent }, wrong, outerTos, takenBy };
}

/** Bytes of data in packets, each counted once: some may have been sent again. */
export function bytesCovered(packets: readonly SentPacket[]): number {
  // Sequence numbers wrap around (RFC 9293 section 3.4), so they count from the first.
  const first = packets[0]?.sequence ?? 0;
  const runs = packets.map(({ sequence, payload }) => ({ from: sequence - first | 0, payload }));
  let covered = 0, end = -Infinity;
  for (const { from, payload } of runs.sort((a, b) => a.from - b.from)) {
    covered += Math.max(0, from + payload - Math.max(end, from));
    end = Math.max(end, from + payload);
  }
  return covered;
}

/** Did packets arrive as they were sent? An unmarked handshake was sent with 0. */
export function assessArrival(
  { reply, mark, markSyn }: Pick<Exchange, "reply" | "mark" | "markSyn">,
  localAddr: Deno.NetAddr,
): Arrival | null {
  if (reply === null) return null;
  const valueOf = (wanted: string) => reply.headers.find(([name]) => name === wanted)?.[1] ?? "";
  const byteOf = (wanted: string): number | null => {
    const value = valueOf(wanted);
    return /^0x[0-9a-f]{2}$/i.test(value) ? Number(value) : null;
  };
  const [syn, ack, data] = ["arrived-syn", "arrived-ack", "arrived-data"].map(byteOf);
  if (syn === null && ack === null && data === null) return null;
  const peer = valueOf("arrived-peer");
  const isOther = peer !== "" && peer !== formatAddress(unmapIPv4(localAddr));
  const first = markSyn ? mark.tos : 0;
  // A marked request may overtake an unmarked ACK, and end the handshake in its place.
  const isRequest = !markSyn && ack !== null && sameDscp(ack, mark.tos);
  const reported = [
    ["SYN", first, syn],
    ["ACK", first, isRequest ? null : ack],
    ["data", mark.tos, data],
  ] as const;
  const packets = reported.flatMap(([packet, sent, arrived]) =>
    isOther || arrived === null ? [] : [{ packet, sent, arrived }]
  );
  const changes = packets.filter(({ sent, arrived }) => !sameDscp(sent, arrived));
  const marked = packets.filter(({ packet }) => markSyn || packet === "data");
  const isChangedEarly = changes.some(({ packet }) => packet !== "data");
  const isShown = packets.some(({ packet }) => packet === "SYN");
  return {
    syn,
    ack,
    data,
    isOther,
    marked: marked.map(({ arrived }) => arrived),
    kept: changes.length > 0 ? false : marked.length > 0 ? true : null,
    changed: changes[0] ?? null,
    handshake: !markSyn ? null : isChangedEarly ? false : isShown ? true : null,
  };
}

/** Whether all data is reported: IPv6 servers know the latest packet's byte, IPv4 servers none. */
export function coversAllData({ data }: Arrival, { packets }: Sent): boolean {
  return data !== null && packets.length === 1;
}

/** One end of a connection, IPv4-mapped addresses as IPv4. */
export function unmapIPv4({ hostname, port }: Deno.NetAddr): Deno.NetAddr {
  return { transport: "tcp", hostname: hostname.replace(/^::ffff:(?=[\d.]+$)/, ""), port };
}

/** 101 or 102, if packets left or arrived with another mark. */
function markFailure({ mark, sent, arrived }: Exchange): Failure | null {
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
  if (arrived === null || arrived.changed === null) return null;
  const { packet, sent: before, arrived: tos } = arrived.changed;
  // The handshake was not observed leaving, so this host may have changed it.
  const isPath = sent.proved && arrived.data !== null && !sameDscp(arrived.data, mark.tos);
  const cause = isPath ? "the path rewrote it" : "rewritten by this host or the path";
  const what = sameDscp(before, mark.tos) ? "" : `${packet} `;
  const message = `${what}sent ${describe(markOf(before))}, arrived ${describe(markOf(tos))}`;
  return new Failure(Exit.arrivedChanged, `${message}: ${cause}`);
}

/** What went wrong, all in all: a wrong mark is more than what else happened to the request. */
export function requestFailure(exchange: Exchange, options: RequestOptions): Failure | null {
  const { failure, target, reply } = exchange, wrong = markFailure(exchange);
  if (failure === null) return wrong ?? proofFailure(exchange, options);
  // An interrupt, or what keeps this program from working, is about the run, not the request.
  const isRun = failure.code >= Exit.notMarked || failure.code === Exit.cannotWrite;
  const isClosed = failure.code === Exit.emptyReply || failure.code === Exit.connectionLost;
  if (wrong === null && isClosed && reply === null && isLikelyTls(target)) {
    return new Failure(failure.code, failure.message, "the server may speak TLS: is it https://?");
  }
  if (wrong === null || isRun) return failure;
  const both = new Failure(wrong.code, `${wrong.message}; ${failure.message}`);
  both.cause = failure;
  return both;
}

/** Which of two failures of a run to end with: the earlier one, or a wrong mark behind another. */
export function moreSevere(earlier: Failure | null, later: Failure | null): Failure | null {
  return earlier === null || (isWrongMark(later) && !isWrongMark(earlier)) ? later : earlier;
}

export function isWrongMark(failure: Failure | null): boolean {
  return failure?.code === Exit.sentChanged || failure?.code === Exit.arrivedChanged;
}

/** Whether http is asked of a port that is usually for https. */
function isLikelyTls({ isHttps, port }: Target): boolean {
  return !isHttps && /443$/.test(String(port));
}

/** 104, if a proof is required: of what left, and of what arrived if the far end is our own. */
function proofFailure(exchange: Exchange, { requireProof }: RequestOptions): Failure | null {
  if (!requireProof) return null;
  const { sent: { proved, packets, bytes, takenBy }, arrived, reply } = exchange;
  if (packets.length === 0) return new Failure(Exit.notProved, "no packet was observed leaving");
  if (takenBy !== null) {
    return new Failure(Exit.notProved, `the packets were handed to ${takenBy}`);
  }
  if (proved === null) {
    const message = `only ${bytes.seen} of ${bytes.sent ?? "?"} bytes were observed leaving`;
    return new Failure(Exit.notProved, message);
  }
  if (!isOurs(reply) || (arrived !== null && !arrived.isOther)) return null;
  const message = arrived === null
    ? "the far end does not report what arrived"
    : "the far end reports what arrived on another connection: a proxy or NAT is in between";
  return new Failure(Exit.notProved, message);
}

/** Whether the far end is one of ours. */
export function isOurs(reply: Reply | null): boolean {
  return reply?.headers.some(([name, value]) =>
    name === "server" && value.startsWith("dscp-get/")
  ) ?? false;
}
