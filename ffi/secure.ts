/**
 * TLS over a descriptor that libc has made: it goes to Deno's event loop through `node:net`, and on through `node:tls`.
 *
 * @module
 */

import { Socket } from "node:net";
import { connect, type TLSSocket } from "node:tls";
import type { Connection } from "./fd.ts";
import { getpeername } from "./libc.ts";
import { familyOf, SOCKADDR_SIZE } from "./sockaddr.ts";

/** Whom to trust as the other end of a TLS connection. */
export interface Trust {
  /** Whom the certificate must be for; SNI where it is a name. */
  readonly hostname: string;
  /** The roots to trust and no others, in PEM; none for the usual ones. */
  readonly caCerts: readonly string[];
  /** Takes any certificate. */
  readonly insecure: boolean;
}

/** Takes over a connected socket that does not block, and begins its TLS. @param ends of the connection */
export function adopt(
  fd: number,
  ends: Connection,
  { hostname, caCerts, insecure }: Trust,
): Secured {
  // Half open, or the end of the reply would close the descriptor while it may still be asked what it sent.
  const socket = new Socket({ fd, readable: true, writable: true, allowHalfOpen: true });
  const name = familyOf(hostname) !== null
    ? { host: hostname }
    : { host: hostname, servername: hostname };
  const ca = caCerts.length === 0 ? {} : { ca: [...caCerts] };
  return new Secured(connect({ socket, ...name, ...ca, rejectUnauthorized: !insecure }), fd, ends);
}

/** A TLS connection over a descriptor of libc; reads and writes as `Deno.TlsConn` does. */
export class Secured {
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
  constructor(socket: TLSSocket, fd: number, { localAddr, remoteAddr }: Connection) {
    this.#socket = socket;
    this.#fd = fd;
    this.localAddr = localAddr;
    this.remoteAddr = remoteAddr;
    // It is never paused: the end of a stream that comes while it is gets lost in Deno 2.9. So what comes is kept here
    // until it is read, which for a reader that takes each chunk at once is one chunk.
    socket.on("data", (chunk: Uint8Array) => this.#take(chunk));
    socket.on("end", () => this.#end(null));
    socket.on("close", () => this.#end(null));
    socket.on("error", (error: Error) => this.#end(error));
  }

  #take(chunk: Uint8Array): void {
    this.#chunks.push(chunk);
    this.#wake();
  }

  #end(failure: Error | null): void {
    this.#isEnded = true;
    this.#failure ??= failure;
    this.#wake();
  }

  /** Waits for the end of the handshake. @throws {Deno.errors.InvalidData} it failed; begins as that of `Deno.startTls` */
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
   * Reads what has come into `buffer`.
   *
   * @returns the number of bytes, or `null` at the end; an end without TLS's own goodbye is not told from one with it
   * @throws {Deno.errors.BadResource} it is closed, or is being closed meanwhile
   */
  async read(buffer: Uint8Array): Promise<number | null> {
    while (this.#chunks.length === 0) {
      if (this.#isClosed) throw new Deno.errors.BadResource("the connection is closed");
      if (this.#failure !== null) throw denoError(this.#failure);
      if (this.#isEnded && this.#isReset()) {
        throw new Deno.errors.ConnectionReset("Connection reset by peer");
      }
      if (this.#isEnded) return null;
      const woken = new Promise<void>((resolve) => this.#wake = resolve);
      await woken;
    }
    const [chunk] = this.#chunks;
    const size = Math.min(buffer.length, chunk.length);
    buffer.set(chunk.subarray(0, size));
    if (size === chunk.length) this.#chunks.shift();
    else this.#chunks[0] = chunk.subarray(size);
    return size;
  }

  // Deno 2.9's node:tls tells a reset as an end, but a socket that was reset has no peer any more.
  #isReset(): boolean {
    return !getpeername(this.#fd, new Uint8Array(SOCKADDR_SIZE));
  }

  /** Writes all of `bytes`. @returns how many they are */
  write(bytes: Uint8Array): Promise<number> {
    return new Promise((resolve, reject) => {
      this.#socket.write(
        bytes,
        (error) => error ? reject(denoError(error)) : resolve(bytes.length),
      );
    });
  }

  /** Closes it; what it waits for ends. */
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
