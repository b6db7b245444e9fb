/**
 * Connects with the mark already set, so that the SYN carries it too.
 *
 * `Deno.connect` gives no chance to set anything before its SYN is out. So the socket is made by libc: marked, connected
 * without blocking, and then handed to Deno's event loop through `node:net`, which is loaded when this module is.
 *
 * @module
 */

import { lookup } from "node:dns/promises";
import { isIP, Socket } from "node:net";
import type { TLSSocket } from "node:tls";
import {
  close,
  connect,
  ECONNREFUSED,
  EINPROGRESS,
  ETIMEDOUT,
  getOption,
  getpeername,
  getsockname,
  LibcError,
  shutdown,
  SO_ERROR,
  strerror,
  tcpSocket,
  writable,
} from "./libc.ts";
import { checkTos } from "./dscp.ts";
import { markDescriptor, MarkError } from "./mark.ts";
import { AF_INET, AF_INET6, decode, encode, endText, SOCKADDR_SIZE } from "./sockaddr.ts";

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
export async function resolve(hostname: string, family: 4 | 6 | null = null, signal?: AbortSignal): Promise<string[]> {
  const literal = isIP(hostname);
  const looked = literal > 0
    ? [{ address: hostname, family: literal }]
    : await Promise.race([lookup(hostname, { all: true }).catch(() => []), aborted(signal)]);
  const wanted = looked.filter((entry) => family === null || entry.family === family);
  if (wanted.length === 0) throw new Error("failed to lookup address information: no such address");
  return wanted.sort((a, b) => b.family - a.family).map(({ address }) => address);
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
  throw new Deno.errors.NotCapable(`Requires net access to "${host}", run again with the --allow-net flag`);
}

async function dialAddress(to: Deno.NetAddr, tos: number | null, signal?: AbortSignal): Promise<Dialed> {
  const fd = openSocket(to);
  const giveUp = () => shutdown(fd);
  try {
    if (tos !== null) markDescriptor(fd, tos);
    signal?.addEventListener("abort", giveUp, { once: true });
    const result = connect(fd, encode(to));
    if (result === EINPROGRESS) await writable(fd);
    signal?.throwIfAborted();
    const failed = result === EINPROGRESS ? getOption(fd, SO_ERROR) : result;
    if (failed !== 0) throw systemError(failed);
    const local = new Uint8Array(SOCKADDR_SIZE), remote = new Uint8Array(SOCKADDR_SIZE);
    if (!getsockname(fd, local) || !getpeername(fd, remote)) throw new Deno.errors.ConnectionReset("Connection reset");
    // Half open, or the end of the reply would close the descriptor while it may still be asked what it sent.
    const socket = new Socket({ fd, readable: true, writable: true, allowHalfOpen: true });
    return new Dialed(socket, decode(local), decode(remote));
  } catch (error) {
    close(fd);
    throw error;
  } finally {
    signal?.removeEventListener("abort", giveUp);
  }
}

function openSocket(to: Deno.NetAddr): number {
  try {
    return tcpSocket(to.hostname.includes(":") ? AF_INET6 : AF_INET);
  } catch (error) {
    // Not a matter of marking, but of connecting: no descriptor is free, or IPv6 is off.
    throw error instanceof LibcError ? systemError(error.errno) : error;
  }
}

/** An error as `Deno.connect` would throw it. */
function systemError(errno: number): Error {
  const message = `${strerror(errno)} (os error ${errno})`;
  if (errno === ECONNREFUSED) return new Deno.errors.ConnectionRefused(message);
  if (errno === ETIMEDOUT) return new Deno.errors.TimedOut(message);
  return new Error(message);
}

/** A connection made by {@linkcode dial}; reads and writes as `Deno.Conn` does. */
export class Dialed {
  /** This end. */
  readonly localAddr: Deno.NetAddr;
  /** The other end. */
  readonly remoteAddr: Deno.NetAddr;
  readonly #socket: Socket;
  #rest: Uint8Array = new Uint8Array();
  #failure: Error | null = null;
  #ended = false;
  #wake: () => void = () => {};

  /** For {@linkcode dial} and {@linkcode Dialed.startTls}. */
  constructor(socket: Socket, localAddr: Deno.NetAddr, remoteAddr: Deno.NetAddr) {
    this.#socket = socket;
    this.localAddr = localAddr;
    this.remoteAddr = remoteAddr;
    socket.on("readable", () => this.#wake());
    socket.on("end", () => this.#end(null));
    socket.on("close", () => this.#end(null));
    socket.on("error", (error: Error) => this.#end(error));
  }

  #end(failure: Error | null): void {
    this.#ended = true;
    this.#failure ??= failure;
    this.#wake();
  }

  /** Reads what has come into `buffer`. @returns the number of bytes, or `null` at the end */
  async read(buffer: Uint8Array): Promise<number | null> {
    while (this.#rest.length === 0) {
      const woken = new Promise<void>((resolve) => this.#wake = resolve);
      const chunk = this.#socket.read() as Uint8Array | null;
      if (chunk !== null) this.#rest = chunk;
      else if (this.#failure !== null) throw denoError(this.#failure);
      else if (this.#ended) return null;
      else await woken;
    }
    const size = Math.min(buffer.length, this.#rest.length);
    buffer.set(this.#rest.subarray(0, size));
    this.#rest = this.#rest.subarray(size);
    return size;
  }

  /** Writes all of `bytes`. @returns how many they are */
  write(bytes: Uint8Array): Promise<number> {
    return new Promise((resolve, reject) => {
      this.#socket.write(bytes, (error) => error ? reject(denoError(error)) : resolve(bytes.length));
    });
  }

  /** Closes it; what it waits for ends. */
  close(): void {
    this.#socket.destroy();
  }

  /**
   * Goes on in TLS over the same descriptor, whose mark stays.
   *
   * @param hostname whom the certificate must be for; SNI where it is a name
   * @param caCerts the roots to trust, in PEM; none for the usual ones
   * @param insecure takes any certificate
   * @throws {Deno.errors.InvalidData} the handshake failed; the message begins as that of `Deno.startTls`
   */
  async startTls(hostname: string, caCerts: readonly string[], insecure: boolean): Promise<Dialed> {
    const { connect } = await import("node:tls");
    this.#socket.removeAllListeners();
    const name = isIP(hostname) > 0 ? { host: hostname } : { host: hostname, servername: hostname };
    const ca = caCerts.length === 0 ? {} : { ca: [...caCerts] };
    const tls: TLSSocket = connect({ socket: this.#socket, ...name, ...ca, rejectUnauthorized: !insecure });
    await new Promise<void>((resolve, reject) => {
      const fail = (message: string) => reject(new Deno.errors.InvalidData(message));
      tls.once("secureConnect", resolve);
      tls.once("close", () => fail("the server closed the connection"));
      tls.once("error", ({ code, message }: Error & { code?: string }) => {
        const isCertificate = /CERT|VERIFY|ISSUER|SIGNED/.test(code ?? "");
        fail(isCertificate ? `invalid peer certificate: ${message}` : message);
      });
    });
    tls.removeAllListeners("close");
    return new Dialed(tls, this.localAddr, this.remoteAddr);
  }
}

function denoError(error: Error & { code?: string }): Error {
  if (error.code === "ECONNRESET") return new Deno.errors.ConnectionReset("Connection reset by peer");
  if (error.code === "EPIPE") return new Deno.errors.BrokenPipe("Broken pipe");
  if (error.code === "ETIMEDOUT") return new Deno.errors.TimedOut("Connection timed out");
  return error;
}
