/**
 * The types of one request and of what became of it. Types only; the comments name the file that
 * makes each value.
 *
 * @module
 */

import type { Arrived } from "../ffi/arrived.ts";
import type { MarkedConn } from "../ffi/conn.ts";
import type { Mark } from "../ffi/dscp.ts";
import type { Hop } from "../ffi/probe.ts";
import type { Trust } from "../ffi/secure.ts";
import type { SentPacket } from "../ffi/sent.ts";
import type { Failure, Stage } from "./failure.ts";
import type { Header, Target } from "./target.ts";

/** How requests are made. */
export interface RequestOptions {
  /** Headers of the user: a value adds or replaces, `null` removes. */
  readonly headers: readonly Header[];
  /** Whether the mark is set before the SYN leaves. */
  readonly markSyn: boolean;
  /** 4 or 6 for one address family only. */
  readonly family: 4 | 6 | null;
  /** What https trusts; `null` for the usual roots. */
  readonly trust: Trust | null;
  /** Seconds to connect in, TLS's handshake included (10); 0 is no limit. */
  readonly connectTimeout: number;
  /** Seconds for the whole request (30); 0 is no limit. */
  readonly maxTime: number;
  /** What is to arrive; `null` for the mark itself. */
  readonly expect: Mark | null;
  /** Whether to fail with 104 unless the whole request was seen leaving, and a far end reports. */
  readonly requireProof: boolean;
}

/** One request and what became of it. */
export interface Exchange {
  /** Where to. */
  readonly target: Target;
  /** The mark that is set. */
  readonly mark: Mark;
  /** Whether it was set before the SYN. */
  readonly markSyn: boolean;
  /** What is to arrive; `null` for the mark itself. */
  readonly expect: Mark | null;
  /** When it began, on the clock of `performance.now()`. */
  started: number;
  /** The connection, once it is marked; `null` if that did not come about. */
  connection: MarkedConn | null;
  /** The reply; `null` if no status line came. */
  reply: Reply | null;
  /** Milliseconds since it began; `null` for what was not reached. */
  readonly milliseconds: { connect: number | null; firstByte: number | null; total: number | null };
  /** What is known of the packets that left. */
  sent: Sent;
  /** What the far end reports; `null` if it reports nothing. */
  arrived: Arrival | null;
  /** The mark of the reply. */
  returned: Returned;
  /** What went wrong; `null` if nothing did. */
  failure: Failure | null;
}

/** A header or trailer of a reply. */
export type Field = [name: string, value: string];

/** A reply as far as it was read, by `reply.ts`. */
export interface Reply {
  /** The status code, 200 to 999. */
  status: number;
  /** The reason phrase, a character a byte. */
  reason: string;
  /** Names in small letters, values a character a byte, in the order they came. */
  headers: Field[];
  /** The fields behind the last chunk, likewise. */
  trailers: Field[];
  /**
   * The ToS byte or Traffic Class of the latest packet when its first bytes were read; `null` if it
   * is unknown, as on IPv4 without CAP_NET_RAW.
   */
  tos: number | null;
  /** Bytes of the body that were read, without the framing of chunks. */
  bodyBytes: number;
  /** Whether the whole body was read. */
  complete: boolean;
}

/** Where the bytes of a reply go; every method may be left out. */
export interface Sink {
  /** Gets status line or header with its line end, as it came, a character a byte. */
  head?(line: string): void | Promise<void>;
  /** Gets the reply so far, before its body; may throw to stop. */
  begin?(reply: Reply): void;
  /** Gets a piece of the body; it is reused once the call has returned or its promise settles. */
  body?(piece: Uint8Array): void | Promise<void>;
}

/** What is known of the packets that left, by `verdict.ts`. */
export interface Sent {
  /** Whether the packets with data left as they should; `null` if they were not all observed. */
  readonly proved: boolean | null;
  /** The packets seen, oldest first. */
  readonly packets: readonly SentPacket[];
  /** How many of them were sent again, whole. */
  readonly repeats: number;
  /** Bytes of data that they carried, and that were sent in all; TLS's own are among them. */
  readonly bytes: { readonly seen: number; readonly sent: number | null };
  /** The first byte seen that is neither the mark's nor the expected one. */
  readonly wrong: number | null;
  /** The outer ToS byte of tunnelled packets: the first that is wrong, else the first. */
  readonly outerTos: number | null;
  /** What took them instead of the network: what then leaves this host is not observed. */
  readonly takenBy: "a tunnel" | "a tunnel device" | "a program on this host" | null;
}

/** What the far end reports, and what follows from it, by `verdict.ts`. */
export interface Arrival extends Omit<Arrived, "sequence"> {
  /** Whether it saw another connection than ours, as with a proxy in between. */
  readonly isOther: boolean;
  /** The client's end as the server sees it, if that is not ours: through NAT. */
  readonly nat: string | null;
  /** The bytes of the marked packets on arrival. */
  readonly marked: readonly number[];
  /** Whether all packets reported arrived as they should; `null` if none was marked. */
  readonly kept: boolean | null;
  /** The packets that arrived with another byte than they should, SYN first. */
  readonly changes: readonly ArrivedChange[];
  /** Whether the handshake arrived with the mark; `null` if it had none, or no SYN is reported. */
  readonly handshake: boolean | null;
  /** What became of the request's ECN bits (RFC 3168 section 5); `null` if they are as sent. */
  readonly ecn: "bleached" | "mangled" | "congestion experienced" | null;
}

/** A packet that arrived with another byte than it was sent with. */
export interface ArrivedChange {
  /** Which one. */
  readonly packet: "SYN" | "ACK" | "data";
  /** The byte that it was sent with. */
  readonly sent: number;
  /** The byte that it should have arrived with: that, or the one that is expected. */
  readonly wanted: number;
  /** The byte that it arrived with. */
  readonly arrived: number;
}

/** The mark of the reply, by `verdict.ts`. */
export interface Returned {
  /** The byte that the server gave it; `null` if the server does not say. */
  readonly sent: number | null;
  /** The byte that its packets had here; `null` if that is not known. */
  readonly arrived: number | null;
  /** Whether both are the same DSCP; `null` if one is unknown. */
  readonly kept: boolean | null;
}

/** A place on a path where a mark was changed. */
export interface Change {
  /** The last hop known to have received the mark as it was; 0 is this host. */
  readonly after: number;
  /** The first hop known to have received another; `null` for one at an unknown distance. */
  readonly at: number | null;
  /** The byte before. */
  readonly from: number;
  /** The byte behind. */
  readonly to: number;
}

/** What a trace found, by `trace.ts`. */
export interface Path {
  /** The mark of its packets. */
  readonly mark: Mark;
  /** The hops, nearest first. */
  readonly path: readonly Hop[];
  /** Where the mark was changed, nearest first. */
  readonly changes: readonly Change[];
}

/** What a request may be given besides where and how. */
export interface RequestContext {
  /** The limits of a series, which has one request after the other. */
  readonly limits?: TimeLimits;
  /** When the request began, and what opens its connection, if that is done already. */
  readonly started?: number;
  /** See {@linkcode RequestContext.started}. */
  readonly connect?: () => Promise<MarkedConn>;
  /** Called once the connection is marked, before the request is written. */
  readonly onMarked?: (exchange: Exchange) => void;
}

/** The time limits of requests, one after the other, by `limits.ts`. */
export interface TimeLimits {
  /** How far the current request has come; the limit on connecting ends with "connected". */
  stage: Stage;
  /** Begins a request. @returns aborts, with a {@linkcode Failure}, when its time is over */
  begin(target: Target): AbortSignal;
  /** Lifts both limits. */
  end(): void;
}

/** What makes a request: `request` of `main.ts`, which series and traces are given. */
export type Requester = (
  target: Target,
  mark: Mark,
  options: RequestOptions,
  sink?: Sink,
  context?: RequestContext,
) => Promise<Exchange>;
