/**
 * Connects with the mark already set, so that the SYN carries it too.
 *
 * `Deno.connect` gives no chance to set anything before its SYN has left. So the socket is libc's
 * from beginning to end: made, marked, connected, read and written through it.
 *
 * @module
 */

import { checkTos } from "./dscp.ts";
import { denoError, getOption, LibcError, lossError, orDenoError } from "./calls.ts";
import { polledEvents, remember, Socket } from "./fd.ts";
import * as libc from "./libc.ts";
import { MarkError, setTosAt } from "./mark.ts";
import { checkPermission, pause } from "./deno.ts";
import { nextEvent, unwatch, watch } from "./poll.ts";
import { decode, encode, familyOf, formatAddress, SOCKADDR_SIZE } from "./sockaddr.ts";
import type { DialedTlsConn, Trust } from "./secure.ts";

/** Where to connect, and with which mark. */
export interface DialOptions {
  /** Host name or IP address, without brackets. */
  readonly hostname: string;
  /** 1 to 65535. */
  readonly port: number;
  /** The byte to set before the SYN, 0 to 252, ECN bits zero; `null` sets none. */
  readonly tos: number | null;
  /** 4 or 6 for one address family only. */
  readonly family?: 4 | 6 | null;
  /** Abandons the attempt when it aborts. */
  readonly signal?: AbortSignal;
}

/**
 * The addresses of a host by the system's own resolver, the families in turn, IPv6 first (RFC 8305
 * section 4); a literal address is its own, and `localhost` and the names below it are the
 * loopback addresses (RFC 6761 section 6.3), which not every resolver knows.
 *
 * @param family 4 or 6 for one address family only
 * @throws {Error} there is none; the message begins as that of `Deno.connect`
 */
export async function resolve(
  hostname: string,
  family: 4 | 6 | null,
  signal: AbortSignal,
): Promise<string[]> {
  const found = familyOf(hostname) !== null
    ? [hostname]
    : /(^|\.)localhost\.?$/i.test(hostname)
    ? ["::1", "127.0.0.1"]
    : await lookUp(hostname, signal);
  const wanted = found.filter((address) => family === null || familyOf(address) === family);
  if (wanted.length === 0) throw new Error("failed to lookup address information: no such address");
  const [six, four] = [6, 4].map((each) => wanted.filter((address) => familyOf(address) === each));
  return wanted.flatMap((_, at) => [six[at], four[at]]).filter((address) => address !== undefined);
}

async function lookUp(hostname: string, signal: AbortSignal): Promise<string[]> {
  // With less it would ask for permission on a terminal, and elsewhere find nothing.
  checkPermission(hostname);
  const { lookup } = await import("node:dns/promises");
  const aborted = new Promise<never>((_, reject) => {
    if (signal.aborted) reject(signal.reason);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
  const found = lookup(hostname, { all: true }).catch((error) => {
    if (error instanceof Deno.errors.NotCapable) throw error;
    return [];
  });
  return (await Promise.race([found, aborted])).map(({ address }) => address);
}

/**
 * Happy Eyeballs, RFC 8305 section 5: tries the next address when one fails or has not connected
 * within 250 ms. The first connection wins; the other attempts are abandoned.
 *
 * @throws whatever the last address failed with, or the signal's reason
 */
export async function connectToFirst<T extends { close(): void }>(
  addresses: readonly string[],
  connect: (address: string, signal: AbortSignal) => Promise<T>,
  signal: AbortSignal = new AbortController().signal,
): Promise<T> {
  const others = new AbortController(), either = AbortSignal.any([signal, others.signal]);
  const attempts = new Set<Promise<T>>();
  let winner: T | void, failure: unknown;
  try {
    for (let next = 0; next < addresses.length || attempts.size > 0;) {
      if (next < addresses.length) {
        const attempt = connect(addresses[next++], either);
        attempts.add(attempt);
        attempt.catch((error) => {
          failure = error;
          attempts.delete(attempt);
        });
      }
      const timer = next < addresses.length ? [pause(250, others.signal)] : [];
      winner = await Promise.race([...attempts, ...timer]).catch(() => {});
      if (winner) return winner;
      // All other addresses would fail the same way.
      if (failure instanceof LibcError || failure instanceof MarkError) break;
      signal.throwIfAborted();
    }
    throw failure;
  } finally {
    others.abort();
    for (const attempt of attempts) {
      attempt.then((conn) => {
        if (conn !== winner) conn.close();
      }, () => {});
    }
  }
}

/**
 * Opens a connection whose every packet carries the mark: SYN, handshake, data and FIN. Of several
 * addresses, the first to connect wins (RFC 8305).
 *
 * Deno does not know of this socket. In a Worker, close it before `terminate()`: a Worker that is
 * terminated meanwhile leaves three descriptors until the process ends, the socket and two to wait
 * with, and a thread until the other end closes.
 *
 * ```ts
 * import { dial } from "./mod.ts";
 * const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
 * const { port } = listener.addr as Deno.NetAddr;
 * const conn = await dial({ hostname: "127.0.0.1", port, tos: 0xB8 });
 * await conn.write(new TextEncoder().encode("hello"));
 * conn.close();
 * listener.close();
 * ```
 *
 * @throws {Deno.errors.NotCapable} `--allow-net` does not allow the host and port, or `--allow-ffi`
 * is missing
 * @throws {RangeError} not a byte that can be set
 * @throws {LibcError | MarkError} the kernel does not accept the mark
 * @throws {Deno.errors.ConnectionRefused | Deno.errors.TimedOut | Error} no such host, or what the
 * last address failed with
 */
export async function dial(options: DialOptions): Promise<DialedConn> {
  const { hostname, port, tos, family = null, signal = new AbortController().signal } = options;
  if (tos !== null) checkTos(tos);
  signal.throwIfAborted();
  checkPermission(formatAddress(options));
  const addresses = await resolve(hostname, family, signal);
  // An address that may not be used is one that fails, before others are tried.
  const connect = async (address: string, signal: AbortSignal) =>
    await dialAddress(destination(address, port), tos, signal);
  return await connectToFirst(addresses, connect, signal);
}

async function dialAddress(to: Uint8Array<ArrayBuffer>, tos: number | null, signal: AbortSignal) {
  const [family] = to;
  const fd = orDenoError(libc.socket(family));
  const abandon = () => unwatch(fd);
  signal.addEventListener("abort", abandon, { once: true });
  try {
    if (tos !== null) setTosAt(fd, family, tos);
    const result = startConnect(fd, to);
    // Not before connect(2), as a socket that is not connecting reports a hang-up at once.
    watch(fd);
    if (result !== -libc.EINPROGRESS) orDenoError(result);
    let conn: DialedConn | null;
    while ((conn = connectedAt(fd)) === null) {
      signal.throwIfAborted();
      await nextEvent(fd);
      signal.throwIfAborted();
      orDenoError(-getOption(fd, libc.SO_ERROR));
    }
    return conn;
  } catch (error) {
    unwatch(fd);
    libc.close(fd);
    throw error;
  } finally {
    signal.removeEventListener("abort", abandon);
  }
}

/** connect(2) as the socket shows it. */
export function startConnect(fd: number, address: Uint8Array<ArrayBuffer>): number {
  return connectResult(libc.connect(fd, address), polledEvents(fd));
}

/** The result of connect(2) by what poll(2) reports: errno may be wrong, see `libc.ts`. */
export function connectResult(result: number, polled: number): number {
  // It failed at once if the socket is as before, closed, with no error to report.
  const hasFailed = (polled & (libc.POLLHUP | libc.POLLERR)) === libc.POLLHUP;
  return hasFailed ? result : -libc.EINPROGRESS;
}

/** The connection of a watched socket; `null` if it has not connected yet, or not any more. */
export function connectedAt(fd: number): DialedConn | null {
  const local = new Uint8Array(SOCKADDR_SIZE), remote = new Uint8Array(SOCKADDR_SIZE);
  if (libc.getpeername(fd, remote) < 0) return null;
  orDenoError(libc.getsockname(fd, local));
  return new DialedConn(new Socket(fd, remote[0], local, remote));
}

/**
 * The `sockaddr` for one address of a name that may be connected to.
 *
 * @param hostname may have a zone, such as `fe80::1%eth0` (RFC 4007 section 11)
 * @throws {Deno.errors.NotCapable} as in `Deno.connect`, `--deny-net` denies this address
 */
export function destination(hostname: string, port: number): Uint8Array<ArrayBuffer> {
  const [bare, zone = "0"] = hostname.split("%");
  checkPermission(formatAddress({ hostname: bare, port }), "not denied");
  const scope = /^\d+$/.test(zone) ? Number(zone) : libc.if_nametoindex(zone);
  return encode({ transport: "tcp", hostname, port }, scope);
}

/** A connection made by {@linkcode dial}; reads and writes as `Deno.Conn` does. */
export class DialedConn {
  /** This end. */
  readonly localAddr: Deno.NetAddr;
  /** The other end. */
  readonly remoteAddr: Deno.NetAddr;
  readonly #socket: Socket;
  #isClosed = false;
  /** A reset or the like, which the kernel reports once; then reads see an end. */
  #loss: Error | null = null;

  /** For {@linkcode dial}. @param socket a connected socket that the poller watches; owns it */
  constructor(socket: Socket) {
    this.#socket = socket;
    this.localAddr = decode(socket.local);
    this.remoteAddr = decode(socket.remote!);
    remember(this, socket);
  }

  /**
   * Reads available bytes into `buffer`.
   *
   * @returns the number of bytes, or `null` at the end
   * @throws {Deno.errors.BadResource} it is closed, or is closed meanwhile
   * @throws {Deno.errors.ConnectionReset | Deno.errors.TimedOut} the connection is lost
   */
  async read(buffer: Uint8Array): Promise<number | null> {
    if (buffer.length === 0) return 0;
    const size = await this.#try(() => libc.recv(this.#socket.fd, buffer, libc.MSG_DONTWAIT));
    if (size === 0 && this.#loss !== null) throw this.#loss;
    return size === 0 ? null : size;
  }

  /**
   * Writes some of `bytes`, in packets of their own.
   *
   * @returns the number of bytes written
   * @throws {Deno.errors.BadResource} it is closed, or is closed meanwhile
   * @throws {Deno.errors.BrokenPipe | Deno.errors.ConnectionReset | Deno.errors.TimedOut} the
   * connection is lost
   */
  async write(bytes: Uint8Array): Promise<number> {
    const flags = libc.MSG_DONTWAIT | libc.MSG_NOSIGNAL | libc.MSG_EOR;
    return await this.#try(() => libc.send(this.#socket.fd, bytes, flags));
  }

  async #try(call: () => number): Promise<number> {
    const { fd } = this.#socket;
    for (let isRepeated = false;;) {
      if (this.#isClosed) throw new Deno.errors.BadResource("the connection is closed");
      const result = call();
      if (result >= 0) return result;
      // A reset, an error, a time limit, or it is closed here.
      const isLost = (polledEvents(fd) & (libc.POLLHUP | libc.POLLNVAL)) !== 0;
      if (isLost) {
        // An error that is still pending came after the call, perhaps with bytes before it.
        const pending = getOption(fd, libc.SO_ERROR);
        const error = lossError(pending || -result);
        // A broken pipe is a reset after the end: what was read until then is whole.
        if (!(error instanceof Deno.errors.BrokenPipe)) this.#loss ??= error;
        if (pending === 0) throw error;
      } else if (result === -libc.EAGAIN) {
        await nextEvent(fd);
        if (!this.#isClosed) this.#socket.onEvent();
      } else {
        // Retry once: a wrong errno does not repeat.
        if (isRepeated) throw denoError(-result);
        isRepeated = true;
      }
    }
  }

  /** Closes it; reads and writes that wait end. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    unwatch(this.#socket.fd);
    libc.close(this.#socket.fd);
  }

  /**
   * Continues in TLS over the same descriptor, whose mark stays. Then only the TLS connection may
   * be read and written. Closing it closes this one too; once this one is closed, it fails.
   *
   * @param hostname the name on the certificate; sent as SNI unless it is an address
   * @param trust `null` for the usual roots
   * @throws {Deno.errors.InvalidData} the handshake failed; the message begins as Deno's own
   */
  async startTls(hostname: string, trust: Trust | null): Promise<DialedTlsConn> {
    const { DialedTlsConn } = await import("./secure.ts");
    if (this.#isClosed) throw new Deno.errors.BadResource("the connection is closed");
    const tls = new DialedTlsConn(this, hostname, trust);
    await tls.handshake();
    return tls;
  }
}
