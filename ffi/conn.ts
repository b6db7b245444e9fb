/**
 * One connection with its mark and its proof. Deno may have opened the socket, or libc, or TLS over
 * either.
 *
 * @module
 */

import { latestClass, openReturned, readReturned, watchClass } from "./arrived.ts";
import type { DialedConn } from "./dial.ts";
import { denoError, getOption, getOptionBytes, LibcError, setOption } from "./calls.ts";
import { DescriptorError, findSocket, type Socket } from "./fd.ts";
import { drainSentAt, interfaceWith, parseDataSent, type SentPacket, watchSentAt } from "./sent.ts";
import * as libc from "./libc.ts";
import { setTosAt } from "./mark.ts";
import type { Trust } from "./secure.ts";
import { pause } from "./deno.ts";

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
  const { markSyn, trust, family, requestSize } = options;
  const name = options.hostname.toLowerCase();
  return markSyn || trust !== null || family !== null || requestSize > ONE_PACKET ||
    name.endsWith(".localhost") || name.endsWith(".localhost.");
}

/** What is read and written: a connection of Deno's, or one of `dial`, which brings its own TLS. */
interface Stream extends Pick<Deno.Conn, "read" | "write" | "close"> {
  startTls?(hostname: string, trust: Trust | null): Promise<Stream>;
  closeWrite?(): Promise<void>;
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
  /** A raw socket for what returns on IPv4, until it has been read. */
  #raw: number | null = null;
  #returned: number | null = null;
  #isFinished = false;
  #isClosed = false;
  /** A reset that a write was told of: the kernel reports it once, and then reads see an end. */
  #reset: Error | null = null;

  private constructor(stream: Deno.TcpConn | DialedConn) {
    this.#stream = stream;
    this.#socket = findSocket(stream);
    this.fd = this.#socket.fd;
    this.localAddr = stream.localAddr;
    this.remoteAddr = stream.remoteAddr;
    // Deno's own socket has no events; a function there would keep the connection in memory.
    if ("startTls" in stream) this.#socket.onEvent = () => this.#drain();
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
    if (!this.#socket.isOurs) throw new DescriptorError("the connection is closed");
    this.readBack = setTosAt(this.fd, this.#socket.family, tos);
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
    const stream = this.#stream;
    if (stream.startTls === undefined && trust !== null) {
      throw new TypeError("only a connection of dial() can be given other roots to trust");
    }
    this.#watch();
    // Otherwise the request waits for the ACK of the handshake's last packet: 41 ms.
    setOption(this.fd, libc.TCP_NODELAY, 1);
    this.#isTls = true;
    if (stream.startTls !== undefined) {
      this.#stream = await stream.startTls(hostname, trust);
      return;
    }
    this.#isShakingHands = true;
    const tls = await Deno.startTls(stream as Deno.TcpConn, { hostname });
    this.#stream = tls;
    // A close that came meanwhile has closed what was not TLS yet.
    if (this.#isClosed) tls.close();
    await tls.handshake();
    this.#isShakingHands = false;
  }

  /** Has the kernel keep copies of what is sent, and report the mark of what arrives. */
  #watch(): void {
    if (this.#isWatched) return;
    this.#raw = openReturned(this.#socket);
    try {
      watchClass(this.#socket);
      watchSentAt(this.#socket);
      this.#isWatched = true;
    } catch (error) {
      // The mark is set; what left is "not observed".
      if (!(error instanceof LibcError)) throw error;
    }
  }

  /** Reads available bytes into `buffer`. @returns how many, or `null` at the end */
  async read(buffer: Uint8Array): Promise<number | null> {
    try {
      const size = await this.#stream.read(buffer);
      if (size === null && this.#reset !== null) throw this.#reset;
      return size;
    } catch (error) {
      // An end without close_notify, which many servers leave out; curl takes it as well.
      if (error instanceof Deno.errors.UnexpectedEof) return null;
      // Deno's TLS has other words for it.
      throw error instanceof Deno.errors.ConnectionReset ? denoError(libc.ECONNRESET) : error;
    }
  }

  /** Writes all of `bytes`, each segment by itself: the kernel copies one packet for each write. */
  async write(bytes: Uint8Array): Promise<void> {
    this.#watch();
    this.#isWriting = true;
    const isSplit = this.#isWatched && bytes.length > SMALLEST_SEGMENT;
    try {
      for (let at = 0; at < bytes.length;) {
        // The path's MTU may have been learned since the last write.
        const atOnce = isSplit ? getOption(this.fd, libc.TCP_MAXSEG) : bytes.length;
        const size = await this.#stream.write(bytes.subarray(at, at + atOnce));
        this.#dataSent = (this.#dataSent ?? 0) + size;
        at += size;
        // The kernel drops copies that do not fit the receive buffer.
        if (at < bytes.length) this.#drain();
      }
      this.#isWriting = false;
    } catch (error) {
      if (error instanceof Deno.errors.ConnectionReset) this.#reset = error;
      throw error;
    }
  }

  /**
   * Bytes of data sent, TLS's own included, each counted once; `null` if the kernel cannot say, and
   * while a write is under way or if it has failed.
   */
  get dataSent(): number | null {
    return this.#isWriting ? null : this.#dataSent;
  }

  /** The network interface that has this end's address; `null` if none has. */
  get device(): string | null {
    return interfaceWith(this.#socket.local);
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
    if (this.#isTls) this.#dataSent = parseDataSent(getOptionBytes(this.fd, libc.TCP_INFO));
    this.#packets.push(...drainSentAt(this.#socket));
  }

  /**
   * The Traffic Class of the latest packet that arrived, on IPv6. On IPv4 the ToS byte of the
   * latest packet with data before the first call, with CAP_NET_RAW; `null` without.
   */
  get arrivedTos(): number | null {
    if (this.#raw !== null) {
      this.#returned = readReturned(this.#raw, this.#socket);
      this.#closeRaw();
    }
    return this.#returned ?? (this.#socket.isOurs ? latestClass(this.#socket) : null);
  }

  #closeRaw(): void {
    if (this.#raw !== null) libc.close(this.#raw);
    this.#raw = null;
  }

  /**
   * Ends the connection in order: sends TLS's close_notify (RFC 8446 section 6.1), waits for the
   * copies of all packets, up to a second for each, and closes the socket.
   */
  async finish(): Promise<void> {
    if (this.#isTls) {
      const sent = new AbortController();
      this.#stream.closeWrite!().catch(() => {}).finally(() => sent.abort());
      await pause(1000, sent.signal);
      this.#isFinished = true;
      // Copies may come back, but not yet of everything.
      const isAwaited = () => {
        const seen = this.sent.reduce((sum, { payload }) => sum + payload, 0);
        return seen > 0 && seen < (this.#dataSent ?? 0);
      };
      for (let wait = 1; wait < 512 && isAwaited(); wait *= 2) await pause(wait);
    }
    this.close();
  }

  /** Collects the last copies and closes the socket; reads and writes that wait end. */
  close(): void {
    if (this.#isClosed) return;
    // The copies outlive a reset of the connection, but not its descriptor.
    this.#drain();
    // Deno may yet send close_notify, which is not observed.
    if (this.#isTls && !this.#isFinished) this.#dataSent = null;
    this.#isClosed = true;
    this.#closeRaw();
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
