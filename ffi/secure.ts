/**
 * TLS over a descriptor that libc has made: `node:net` hands it to Deno's event loop, and `node:tls`
 * speaks TLS over it.
 *
 * @module
 */

import { Socket } from "node:net";
import { connect, type TLSSocket } from "node:tls";
import type { DialedConn } from "./dial.ts";
import { getpeername } from "./libc.ts";
import { familyOf, SOCKADDR_SIZE } from "./sockaddr.ts";

/** Which certificates a TLS connection trusts. */
export interface Trust {
  /** The roots to trust and no others, in PEM; none for the usual ones. */
  readonly caCerts: readonly string[];
  /** Accepts any certificate. */
  readonly insecure: boolean;
}

/** Takes over a connected socket of libc, and begins its TLS handshake. */
export function adopt(dialed: DialedConn, hostname: string, trust: Trust | null): DialedTlsConn {
  const { fd } = dialed.socket;
  // Half open, or the end of the reply would close the descriptor before its packets are read.
  const socket = new Socket({ fd, readable: true, writable: true, allowHalfOpen: true });
  const servername = familyOf(hostname) === null ? { servername: hostname } : {};
  const ca = trust === null || trust.caCerts.length === 0 ? {} : { ca: [...trust.caCerts] };
  const rejectUnauthorized = !trust?.insecure;
  const tls = connect({ socket, host: hostname, ...servername, ...ca, rejectUnauthorized });
  return new DialedTlsConn(tls, dialed);
}

/** A TLS connection over a descriptor of libc; reads and writes as `Deno.TlsConn` does. */
export class DialedTlsConn {
  /** This end. */
  readonly localAddr: Deno.Addr;
  /** The other end. */
  readonly remoteAddr: Deno.Addr;
  readonly #socket: TLSSocket;
  readonly #fd: number;
  readonly #chunks: Uint8Array[] = [];
  #failure: Error | null = null;
  #isEnded = false;
  #isClosed = false;
  #wake: () => void = () => {};

  /** For {@linkcode adopt}. */
  constructor(socket: TLSSocket, dialed: DialedConn) {
    this.#socket = socket;
    this.#fd = dialed.socket.fd;
    this.localAddr = dialed.localAddr;
    this.remoteAddr = dialed.remoteAddr;
    // The socket is never paused: Deno 2.9 loses the end of a stream that comes while it is. So the
    // chunks are kept here until they are read.
    socket.on("data", (chunk: Uint8Array) => {
      this.#chunks.push(chunk);
      this.#wake();
    });
    socket.on("end", () => this.#end(null));
    socket.on("close", () => this.#end(null));
    socket.on("error", (error: Error) => this.#end(error));
  }

  #end(failure: Error | null): void {
    this.#isEnded = true;
    this.#failure ??= failure;
    this.#wake();
  }

  /** Waits for the handshake. @throws {Deno.errors.InvalidData} it failed, in Deno's own words */
  async handshake(): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      const fail = (message: string) => reject(new Deno.errors.InvalidData(message));
      this.#socket.once("secureConnect", resolve);
      this.#socket.once("close", () => fail("the server closed the connection"));
      this.#socket.once("error", ({ code, message }: Error & { code?: string }) => {
        const isCertificate = /CERT|VERIFY|ISSUER|SIGNED/.test(code ?? "");
        fail(isCertificate ? `invalid peer certificate: ${message}` : message);
      });
    });
  }

  /**
   * Reads available bytes into `buffer`.
   *
   * @returns the number of bytes, or `null` at the end, with or without close_notify
   * @throws {Deno.errors.BadResource} it is closed, or is closed meanwhile
   */
  async read(buffer: Uint8Array): Promise<number | null> {
    while (this.#chunks.length === 0) {
      if (this.#isClosed) throw new Deno.errors.BadResource("the connection is closed");
      if (this.#failure !== null) throw denoError(this.#failure);
      if (this.#isEnded && this.#isReset()) {
        throw new Deno.errors.ConnectionReset("Connection reset by peer");
      }
      if (this.#isEnded) return null;
      await new Promise<void>((resolve) => this.#wake = resolve);
    }
    const [chunk] = this.#chunks;
    const size = Math.min(buffer.length, chunk.length);
    buffer.set(chunk.subarray(0, size));
    if (size === chunk.length) this.#chunks.shift();
    else this.#chunks[0] = chunk.subarray(size);
    return size;
  }

  // Deno 2.9's node:tls reports a reset as an end, but a socket that was reset has no peer any more.
  #isReset(): boolean {
    return getpeername(this.#fd, new Uint8Array(SOCKADDR_SIZE)) < 0;
  }

  /** Writes all of `bytes`. @returns how many they are */
  write(bytes: Uint8Array): Promise<number> {
    return new Promise((resolve, reject) => {
      const done = (error?: Error | null) =>
        error ? reject(denoError(error)) : resolve(bytes.length);
      this.#socket.write(bytes, done);
    });
  }

  /** Closes it; reads and writes that wait end. */
  close(): void {
    this.#isClosed = true;
    this.#socket.destroy();
    this.#wake();
  }
}

function denoError(error: Error & { code?: string }): Error {
  if (error.code === "ECONNRESET") {
    return new Deno.errors.ConnectionReset("Connection reset by peer");
  }
  if (error.code === "EPIPE") return new Deno.errors.BrokenPipe("Broken pipe");
  if (error.code === "ETIMEDOUT") return new Deno.errors.TimedOut("Connection timed out");
  return error;
}
