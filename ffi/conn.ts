/**
 * One connection with its mark and its proof. Deno may have opened the socket, or libc, or TLS over
 * either.
 *
 * @module
 */

import { latestClass, watchArriving } from "./arrived.ts";
import type { DialedConn } from "./dial.ts";
import { type ConnectedSocket, findConnection } from "./fd.ts";
import * as libc from "./libc.ts";
import { setTos } from "./mark.ts";
import type { Trust } from "./secure.ts";
import { dataSent, drainSent, type SentPacket, watchSent } from "./sent.ts";

/** Where to connect, how to mark the connection, and what it is for. */
export interface ConnectOptions {
  /** Host name or IP address, without brackets. */
  readonly hostname: string;
  /** 1 to 65535. */
  readonly port: number;
  /** The ToS byte or Traffic Class, 0 to 252, ECN bits zero. */
  readonly tos: number;
  /** Sets the mark before the SYN leaves. */
  readonly markSyn: boolean;
  /** 4 or 6 for one address family only. */
  readonly family: 4 | 6 | null;
  /** What TLS over it will trust; `null` for what Deno trusts. */
  readonly trust: Trust | null;
  /** Bytes of the largest write. */
  readonly requestSize: number;
}

// What any path carries in one packet, RFC 9293 section 3.7.1.
const SMALLEST_SEGMENT = 536;
// What a packet of 1280 bytes carries, RFC 8200 section 5, behind the headers of IPv6 and of TCP
// with its timestamps, and in the longest record that TLS makes of it.
const ONE_PACKET = 1280 - 40 - 32 - 29;

/**
 * Whether the connection needs a socket of libc rather than Deno's: to mark the SYN, to trust other
 * roots, to choose among addresses, for a name that Deno may not resolve, and for a request of more
 * than one packet. Only libc's can keep writes in packets of their own; and copies of packets on the
 * error queue make Deno take the write side for closed, so that a write that waits would spin.
 */
function needsDial({ hostname, markSyn, trust, family, requestSize }: ConnectOptions): boolean {
  return markSyn || trust !== null || family !== null || requestSize > ONE_PACKET ||
    /\.localhost\.?$/i.test(hostname);
}

/** Loads what a connection needs, so that loading is not counted as connect time. */
export async function prepareConnect(options: ConnectOptions, isTls: boolean): Promise<void> {
  if (!needsDial(options)) return;
  await import("./dial.ts");
  if (isTls) await import("./secure.ts");
}

/** A TCP connection with its mark, and the proof of what it has sent. */
export class MarkedConn implements Disposable {
  /** This end. */
  readonly localAddr: Deno.NetAddr;
  /** The other end. */
  readonly remoteAddr: Deno.NetAddr;
  /** The descriptor: this connection's until it is closed. */
  readonly fd: number;
  /** The byte that the kernel read back, once the connection is marked. */
  readBack: number | null = null;
  #stream: Pick<Deno.Conn, "read" | "write" | "close">;
  readonly #socket: ConnectedSocket;
  readonly #packets: SentPacket[] = [];
  /** Shows, once TLS has the descriptor and may have closed it, whether it is still ours. */
  #cookie: bigint | null | undefined;
  #dataSent: number | null = 0;
  #isWatched = false;
  #isWriting = false;
  #isShakingHands = false;
  #isClosed = false;

  /** @param options those that it was opened with */
  private constructor(stream: Deno.TcpConn | DialedConn, readonly options: ConnectOptions) {
    this.#stream = stream;
    this.#socket = "socket" in stream ? stream.socket : findConnection(stream);
    this.fd = this.#socket.fd;
    this.localAddr = stream.localAddr;
    this.remoteAddr = stream.remoteAddr;
    if ("socket" in stream) stream.onEvent = () => this.#drain();
  }

  /**
   * Connects and marks.
   *
   * @param signal abandons the attempt when it aborts
   * @throws {LibcError | MarkError} the kernel does not accept the mark
   * @throws {DescriptorError} the connection was reset, or its descriptor cannot be found
   * @throws {Error} whatever `Deno.connect` throws
   */
  static async connect(options: ConnectOptions, signal?: AbortSignal): Promise<MarkedConn> {
    const { hostname, port, tos, markSyn, family } = options;
    if (!needsDial(options)) {
      return MarkedConn.adopt(await Deno.connect({ hostname, port, signal }), options);
    }
    const { dial } = await import("./dial.ts");
    const conn = await dial({ hostname, port, tos: markSyn ? tos : null, family, signal });
    return MarkedConn.adopt(conn, options);
  }

  /**
   * Takes over a connection that was opened just now, and marks it; closes it if that fails.
   *
   * @throws {LibcError | MarkError | DescriptorError} as {@linkcode MarkedConn.connect}
   */
  static adopt(stream: Deno.TcpConn | DialedConn, options: ConnectOptions): MarkedConn {
    try {
      const conn = new MarkedConn(stream, options);
      // A new byte drops the socket's cached route, the 0 that it starts with does not, and this
      // option always does. Otherwise requests with DF would be faster, measured 1.01 times.
      libc.setOption(conn.fd, libc.SO_DONTROUTE, 0);
      conn.readBack = setTos(conn.#socket, options.tos);
      return conn;
    } catch (error) {
      stream.close();
      throw error;
    }
  }

  /**
   * Continues in TLS over the same socket.
   *
   * @throws {Deno.errors.InvalidData | Error} the handshake failed
   */
  async startTls(hostname: string): Promise<void> {
    this.#watch();
    this.#cookie = libc.socketCookie(this.fd);
    const stream = this.#stream;
    if ("socket" in stream) {
      this.#stream = await (stream as DialedConn).startTls(hostname, this.options.trust);
      return;
    }
    const tls = await Deno.startTls(stream as Deno.TcpConn, { hostname });
    this.#stream = tls;
    // A close that came meanwhile has closed what was not TLS yet.
    if (this.#isClosed) tls.close();
    this.#isShakingHands = true;
    await tls.handshake();
    this.#isShakingHands = false;
  }

  /** Has the kernel keep copies of what is sent, and report the class of what arrives. */
  #watch(): void {
    if (this.#isWatched) return;
    try {
      watchArriving(this.#socket);
      watchSent(this.#socket);
      this.#isWatched = true;
    } catch (error) {
      // The mark is set; what left is "not observed".
      if (!(error instanceof libc.LibcError)) throw error;
    }
  }

  /** Reads available bytes into `buffer`. @returns how many, or `null` at the end */
  read(buffer: Uint8Array): Promise<number | null> {
    return this.#stream.read(buffer);
  }

  /** Writes all of `bytes`, each segment by itself: the kernel copies one packet for each write. */
  async write(bytes: Uint8Array): Promise<void> {
    this.#watch();
    this.#isWriting = true;
    const isSplit = this.#isWatched && bytes.length > SMALLEST_SEGMENT;
    const atOnce = isSplit ? libc.getOption(this.fd, libc.TCP_MAXSEG) : bytes.length;
    for (let at = 0; at < bytes.length;) {
      const size = await this.#stream.write(bytes.subarray(at, at + atOnce));
      this.#dataSent = (this.#dataSent ?? 0) + size;
      at += size;
      // The kernel drops copies that do not fit the receive buffer.
      if (at < bytes.length) this.#drain();
    }
    this.#isWriting = false;
  }

  /**
   * Bytes of data sent, TLS's own included, each counted once; `null` if the kernel cannot say, and
   * while a write is under way or if it has failed.
   */
  get dataSent(): number | null {
    return this.#isWriting ? null : this.#dataSent;
  }

  /** The packets sent so far, oldest first, as the kernel looped them back. */
  get sent(): readonly SentPacket[] {
    this.#drain();
    return this.#packets;
  }

  /** Whether the descriptor still is this connection's. */
  get #isOurs(): boolean {
    return this.#cookie === undefined || this.#cookie === libc.socketCookie(this.fd);
  }

  #drain(): void {
    if (this.#isWatched && !this.#isClosed && this.#isOurs) {
      // TLS's own bytes are known to the kernel alone.
      if (this.#cookie !== undefined) this.#dataSent = dataSent(this.fd);
      this.#packets.push(...drainSent(this.#socket));
    }
  }

  /** The Traffic Class of the latest packet that arrived; `null` on IPv4, which reports none. */
  get arrivedTos(): number | null {
    return latestClass(this.#socket);
  }

  /** Collects the last copies and closes the socket; reads and writes that wait end. */
  close(): void {
    if (this.#isClosed) return;
    // The copies outlive a reset of the connection, but not its descriptor.
    this.#drain();
    this.#isClosed = true;
    // Deno keeps a TLS connection open while its handshake waits for the server.
    if (this.#isShakingHands && this.#isOurs) libc.shutdown(this.fd);
    try {
      this.#stream.close();
    } catch { /* a TLS handshake that failed has closed it */ }
  }

  /** {@linkcode close} */
  [Symbol.dispose](): void {
    this.close();
  }
}
