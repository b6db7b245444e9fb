/**
 * One connection with its mark and its proof. Deno may have opened the socket, or libc, or TLS over
 * either.
 *
 * @module
 */

import { latestClass, watchArriving } from "./arrived.ts";
import type { DialedConn } from "./dial.ts";
import { LibcError } from "./errors.ts";
import { remember, type Socket, socketOf } from "./fd.ts";
import * as libc from "./libc.ts";
import { setTos } from "./mark.ts";
import { getOption } from "./option.ts";
import type { Trust } from "./secure.ts";
import { dataSent, drainSent, type SentPacket, watchSent } from "./sent.ts";

/** Where to connect, and what decides whose socket it takes. */
export interface ConnectOptions {
  /** Host name or IP address, without brackets. */
  readonly hostname: string;
  /** 1 to 65535. */
  readonly port: number;
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
 * than one packet. Only libc's can keep writes in packets of their own; and copies of packets on
 * the error queue make Deno take the write side for closed, so that a write that waits would spin.
 */
export function needsOwnSocket(options: ConnectOptions): boolean {
  const { hostname, markSyn, trust, family, requestSize } = options;
  return markSyn || trust !== null || family !== null || requestSize > ONE_PACKET ||
    /\.localhost\.?$/i.test(hostname);
}

/** What is read and written: a connection of Deno's, or one of `dial`, which brings its own TLS. */
interface Stream extends Pick<Deno.Conn, "read" | "write" | "close"> {
  startTls?(hostname: string, trust: Trust | null): Promise<Stream>;
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
  #stream: Stream;
  readonly #socket: Socket;
  readonly #packets: SentPacket[] = [];
  #dataSent: number | null = 0;
  #isWatched = false;
  #isWriting = false;
  #isTls = false;
  #isShakingHands = false;
  #isClosed = false;

  private constructor(stream: Deno.TcpConn | DialedConn) {
    this.#stream = stream;
    this.#socket = socketOf(stream);
    this.fd = this.#socket.fd;
    this.localAddr = stream.localAddr;
    this.remoteAddr = stream.remoteAddr;
    this.#socket.onEvent = () => this.#drain();
    remember(this, this.#socket);
  }

  /**
   * Takes over a connection that was opened just now and finds its descriptor; closes the
   * connection if that fails. The connection is not marked yet.
   *
   * @throws {DescriptorError} the connection was reset, or its descriptor cannot be found
   * @throws {CannotRunError | Deno.errors.NotCapable} libc cannot be called
   */
  static adopt(stream: Deno.TcpConn | DialedConn): MarkedConn {
    try {
      return new MarkedConn(stream);
    } catch (error) {
      stream.close();
      throw error;
    }
  }

  /**
   * Marks the packets that it sends from now on, and keeps the byte that the kernel reads back.
   *
   * @param tos the ToS byte or Traffic Class, 0 to 252, ECN bits zero
   * @throws {RangeError} not such a byte
   * @throws {LibcError | MarkError} the kernel does not accept the mark
   */
  setTos(tos: number): void {
    this.readBack = setTos(this, tos);
  }

  /**
   * Continues in TLS over the same socket.
   *
   * @param hostname the name on the certificate
   * @param trust `null` for what Deno trusts; others only over a socket of `dial`
   * @throws {Deno.errors.InvalidData | Error} the handshake failed
   * @throws {TypeError} Deno's own TLS cannot be given this trust
   */
  async startTls(hostname: string, trust: Trust | null): Promise<void> {
    if (this.#stream.startTls === undefined && trust !== null) {
      throw new TypeError("only a connection of dial() can be given other roots to trust");
    }
    this.#watch();
    this.#isTls = true;
    if (this.#stream.startTls !== undefined) {
      this.#stream = await this.#stream.startTls(hostname, trust);
      return;
    }
    this.#isShakingHands = true;
    const tls = await Deno.startTls(this.#stream as Deno.TcpConn, { hostname });
    this.#stream = tls;
    // A close that came meanwhile has closed what was not TLS yet.
    if (this.#isClosed) tls.close();
    await tls.handshake();
    this.#isShakingHands = false;
  }

  /** Has the kernel keep copies of what is sent, and report the class of what arrives. */
  #watch(): void {
    if (this.#isWatched) return;
    try {
      watchArriving(this);
      watchSent(this);
      this.#isWatched = true;
    } catch (error) {
      // The mark is set; what left is "not observed".
      if (!(error instanceof LibcError)) throw error;
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
    const atOnce = isSplit ? getOption(this.fd, libc.TCP_MAXSEG) : bytes.length;
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

  #drain(): void {
    // TLS may have closed the descriptor, and another connection may have it.
    if (!this.#isWatched || this.#isClosed || !this.#socket.isOurs) return;
    // TLS's own bytes are known to the kernel alone.
    if (this.#isTls) this.#dataSent = dataSent(this.fd);
    this.#packets.push(...drainSent(this));
  }

  /** The Traffic Class of the latest packet that arrived; `null` on IPv4, which reports none. */
  get arrivedTos(): number | null {
    return this.#socket.isOurs ? latestClass(this.#socket) : null;
  }

  /** Collects the last copies and closes the socket; reads and writes that wait end. */
  close(): void {
    if (this.#isClosed) return;
    // The copies outlive a reset of the connection, but not its descriptor.
    this.#drain();
    this.#isClosed = true;
    // Deno keeps a TLS connection open while its handshake waits for the server.
    if (this.#isShakingHands && this.#socket.isOurs) libc.shutdown(this.fd);
    try {
      this.#stream.close();
    } catch { /* a TLS handshake that failed has closed it */ }
  }

  /** {@linkcode close} */
  [Symbol.dispose](): void {
    this.close();
  }
}
