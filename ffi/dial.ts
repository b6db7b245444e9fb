/**
 * Connects with the mark already set, so that the SYN carries it too.
 *
 * `Deno.connect` gives no chance to set anything before its SYN is out. So the socket is libc's from beginning to end:
 * made, marked, connected, read and written through it. What has to wait does so in another thread.
 *
 * @module
 */

import {
  close,
  connect,
  connected,
  EAGAIN,
  ECONNREFUSED,
  ECONNRESET,
  EINPROGRESS,
  EPIPE,
  ETIMEDOUT,
  getOption,
  getpeername,
  getsockname,
  LibcError,
  receivable,
  receive,
  send,
  sendInThread,
  setBlocking,
  shutdown,
  SO_ERROR,
  strerror,
  tcpSocket,
} from "./libc.ts";
import { checkTos } from "./dscp.ts";
import { MarkError, markSocket } from "./mark.ts";
import { AF_INET, AF_INET6, decode, encode, endText, familyOf, SOCKADDR_SIZE } from "./sockaddr.ts";
import type { Secured } from "./secure.ts";

/** Where to, and with which mark. */
export interface DialOptions {
  /** Host name or IP address, without brackets. */
  readonly hostname: string;
  /** 1 to 65535. */
  readonly port: number;
  /** The byte to set before the SYN, 0 to 252, ECN bits zero; `null` sets none. */
  readonly tos: number | null;
  /** 4 or 6 for one address family only. */
  readonly family?: 4 | 6 | null;
  /** Gives up when it aborts. */
  readonly signal?: AbortSignal;
}

/**
 * The addresses of a host by the system's own resolver, IPv6 first; a literal address is its own.
 *
 * @param family 4 or 6 for one address family only
 * @throws {Error} there is none; the message begins as that of `Deno.connect`
 */
export async function resolve(
  hostname: string,
  family: 4 | 6 | null = null,
  signal?: AbortSignal,
): Promise<string[]> {
  const literal = familyOf(hostname);
  const looked = literal !== null
    ? [{ address: hostname, family: literal }]
    : await lookedUp(hostname, signal);
  const wanted = looked.filter((entry) => family === null || entry.family === family);
  if (wanted.length === 0) throw new Error("failed to lookup address information: no such address");
  return wanted.sort((a, b) => b.family - a.family).map(({ address }) => address);
}

async function lookedUp(
  hostname: string,
  signal: AbortSignal | undefined,
): Promise<{ address: string; family: number }[]> {
  const { lookup } = await import("node:dns/promises");
  return await Promise.race([lookup(hostname, { all: true }).catch(() => []), aborted(signal)]);
}

function aborted(signal: AbortSignal | undefined): Promise<never> {
  return new Promise((_, reject) => {
    if (signal?.aborted) reject(signal.reason);
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

/**
 * Opens a connection whose every packet carries the mark: SYN, handshake, data and FIN. Addresses are tried one after
 * the other.
 *
 * ```ts
 * import { dial } from "./mod.ts";
 * const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
 * const conn = await dial({ hostname: "127.0.0.1", port: (listener.addr as Deno.NetAddr).port, tos: 0xB8 });
 * await conn.write(new TextEncoder().encode("hello"));
 * conn.close();
 * listener.close();
 * ```
 *
 * @throws {Deno.errors.NotCapable} `--allow-net` does not allow the host and port, or `--allow-ffi` is missing
 * @throws {RangeError} not a byte to be set
 * @throws {LibcError | MarkError} the kernel does not take the mark
 * @throws {Deno.errors.ConnectionRefused | Deno.errors.TimedOut | Error} no such host, or the last address's reason
 */
export async function dial(options: DialOptions): Promise<Dialed> {
  const { hostname, port, tos, family = null, signal } = options;
  if (tos !== null) checkTos(tos);
  checkPermission(hostname, port, "granted");
  let failure: unknown;
  for (const address of await resolve(hostname, family, signal)) {
    // As in Deno.connect: what the name allows, --deny-net may still deny for the address.
    checkPermission(address, port, "not denied");
    try {
      return await dialAddress({ transport: "tcp", hostname: address, port }, tos, signal);
    } catch (error) {
      signal?.throwIfAborted();
      if (error instanceof LibcError || error instanceof MarkError) throw error;
      failure = error;
    }
  }
  throw failure;
}

// libc asks nobody, so Deno is asked before it.
function checkPermission(hostname: string, port: number, need: "granted" | "not denied"): void {
  const host = endText({ transport: "tcp", hostname, port });
  const { state } = Deno.permissions.querySync({ name: "net", host });
  if (state === "granted" || (state === "prompt" && need === "not denied")) return;
  throw new Deno.errors.NotCapable(
    `Requires net access to "${host}", run again with the --allow-net flag`,
  );
}

async function dialAddress(
  to: Deno.NetAddr,
  tos: number | null,
  signal?: AbortSignal,
): Promise<Dialed> {
  const family = to.hostname.includes(":") ? AF_INET6 : AF_INET;
  const fd = openSocket(family);
  const giveUp = () => shutdown(fd);
  try {
    if (tos !== null) markSocket({ fd, family }, tos);
    signal?.addEventListener("abort", giveUp, { once: true });
    const result = connect(fd, encode(to));
    if (result === EINPROGRESS) await connected(fd);
    signal?.throwIfAborted();
    const failed = result === EINPROGRESS ? getOption(fd, SO_ERROR) : result;
    if (failed !== 0) throw systemError(failed);
    const local = new Uint8Array(SOCKADDR_SIZE), remote = new Uint8Array(SOCKADDR_SIZE);
    if (!getsockname(fd, local) || !getpeername(fd, remote)) {
      throw new Deno.errors.ConnectionReset("Connection reset");
    }
    setBlocking(fd, true);
    return new Dialed(fd, decode(local), decode(remote));
  } catch (error) {
    close(fd);
    throw error;
  } finally {
    signal?.removeEventListener("abort", giveUp);
  }
}

function openSocket(family: number): number {
  try {
    return tcpSocket(family);
  } catch (error) {
    // Not a matter of marking, but of connecting: no descriptor is free, or IPv6 is off.
    throw error instanceof LibcError ? systemError(error.errno) : error;
  }
}

/** An error as Deno's own connections throw it. */
function systemError(errno: number): Error {
  const message = `${strerror(errno)} (os error ${errno})`;
  switch (errno) {
    case ECONNREFUSED:
      return new Deno.errors.ConnectionRefused(message);
    case ECONNRESET:
      return new Deno.errors.ConnectionReset(message);
    case EPIPE:
      return new Deno.errors.BrokenPipe(message);
    case ETIMEDOUT:
      return new Deno.errors.TimedOut(message);
    default:
      return new Error(message);
  }
}

/** A connection made by {@linkcode dial}; reads and writes as `Deno.Conn` does. */
export class Dialed {
  /** This end. */
  readonly localAddr: Deno.NetAddr;
  /** The other end. */
  readonly remoteAddr: Deno.NetAddr;
  readonly #fd: number;
  /** How many calls wait in other threads. */
  #waiting = 0;
  #isClosed = false;
  /** Whoever has the descriptor instead of us. */
  #heir: { close(): void } | null = null;

  /** For {@linkcode dial}. @param fd a connected socket that blocks */
  constructor(fd: number, localAddr: Deno.NetAddr, remoteAddr: Deno.NetAddr) {
    this.#fd = fd;
    this.localAddr = localAddr;
    this.remoteAddr = remoteAddr;
  }

  /**
   * Reads what has come into `buffer`.
   *
   * @returns the number of bytes, or `null` at the end
   * @throws {Deno.errors.BadResource} it is closed, or is being closed meanwhile
   */
  async read(buffer: Uint8Array): Promise<number | null> {
    if (buffer.length === 0) return 0;
    for (let hasFailed = false;;) {
      const size = receive(this.#open(), buffer);
      if (size > 0) return size;
      // After an error that was told elsewhere the connection seems to have ended well.
      if (size === 0 && hasFailed) throw systemError(ECONNRESET);
      if (size === 0) return null;
      if (size !== -EAGAIN) throw systemError(-size);
      hasFailed = !await this.#wait(receivable(this.#fd));
    }
  }

  /**
   * Writes some of `bytes`.
   *
   * @returns how many of them
   * @throws {Deno.errors.BadResource} it is closed, or is being closed meanwhile
   */
  async write(bytes: Uint8Array): Promise<number> {
    for (;;) {
      const size = send(this.#open(), bytes);
      if (size >= 0) return size;
      if (size !== -EAGAIN) throw systemError(-size);
      const sent = await this.#wait(sendInThread(this.#fd, bytes));
      if (sent >= 0) return sent;
    }
  }

  /** Closes it; what it waits for ends. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    if (this.#heir !== null) this.#heir.close();
    else if (this.#waiting === 0) close(this.#fd);
    // Closed under a call that waits, the number might be another socket's when that call looks at it again.
    else shutdown(this.#fd);
  }

  #open(): number {
    if (this.#isClosed || this.#heir !== null) {
      throw new Deno.errors.BadResource("the connection is closed");
    }
    return this.#fd;
  }

  async #wait<T>(call: Promise<T>): Promise<T> {
    this.#waiting++;
    try {
      return await call;
    } finally {
      if (--this.#waiting === 0 && this.#isClosed) close(this.#fd);
    }
  }

  /**
   * Goes on in TLS over the same descriptor, whose mark stays; closing either connection closes both.
   *
   * @param hostname whom the certificate must be for; SNI where it is a name
   * @param caCerts the roots to trust and no others, in PEM; none for the usual ones
   * @param insecure takes any certificate
   * @throws {Deno.errors.InvalidData} the handshake failed; the message begins as that of `Deno.startTls`
   */
  async startTls(
    hostname: string,
    caCerts: readonly string[],
    insecure: boolean,
  ): Promise<Secured> {
    const { adopt } = await import("./secure.ts");
    const fd = this.#open();
    setBlocking(fd, false);
    const secured = adopt(fd, this, { hostname, caCerts, insecure });
    this.#heir = secured;
    await secured.handshake();
    return secured;
  }
}
