/**
 * TLS over a connection of libc: `node:tls` speaks it through the connection's reads and writes.
 *
 * @module
 */

import { Duplex } from "node:stream";
import { connect, type TLSSocket } from "node:tls";
import { BAD_CERTIFICATE, getOption } from "./calls.ts";
import { fdOf } from "./fd.ts";
import { TCP_MAXSEG } from "./libc.ts";
import { familyOf } from "./sockaddr.ts";

/** Which certificates a TLS connection trusts. */
export interface Trust {
  /** The roots to trust and no others, in PEM; none for the usual ones. */
  readonly caCerts: readonly string[];
  /** Accepts any certificate. */
  readonly insecure: boolean;
}

/** The connection below, as `DialedConn` is one: each write is a packet of its own. */
export type Transport = Pick<Deno.Conn, "localAddr" | "remoteAddr" | "read" | "write" | "close">;

/** A TLS connection over one of libc; reads and writes as `Deno.TlsConn` does. */
export class DialedTlsConn {
  /** This end. */
  readonly localAddr: Deno.Addr;
  /** The other end. */
  readonly remoteAddr: Deno.Addr;
  readonly #below: Transport;
  readonly #socket: TLSSocket;
  /** Decrypted and not read yet. */
  readonly #chunks: Uint8Array[] = [];
  #failure: Error | null = null;
  #isEnded = false;
  #wakeReader: () => void = () => {};
  #wakeTransport: () => void = () => {};

  /** For `DialedConn.startTls`; begins the handshake. */
  constructor(below: Transport, hostname: string, trust: Trust | null) {
    this.#below = below;
    this.localAddr = below.localAddr;
    this.remoteAddr = below.remoteAddr;
    const servername = familyOf(hostname) === null ? { servername: hostname } : {};
    const ca = trust === null || trust.caCerts.length === 0 ? {} : { ca: [...trust.caCerts] };
    const rejectUnauthorized = !trust?.insecure;
    const socket = this.#transport();
    this.#socket = connect({ socket, host: hostname, ...servername, ...ca, rejectUnauthorized });
    // The socket is never paused: Deno 2.9 loses the end of a stream that comes while it is. So the
    // chunks are kept here until they are read, and nothing else is received meanwhile.
    this.#socket.on("data", (chunk: Uint8Array) => {
      this.#chunks.push(chunk);
      this.#wakeReader();
    });
    this.#socket.on("end", () => this.#end(null));
    this.#socket.on("close", () => this.#end(null));
    this.#socket.on("error", (error: Error) => this.#end(error));
  }

  #transport(): Duplex {
    const pieces = splitRecords(this.#below);
    const receive = async () => {
      while (this.#chunks.length > 0) {
        await new Promise<void>((resolve) => this.#wakeTransport = resolve);
      }
      return (await pieces.next()).value;
    };
    // Each segment by itself: the kernel copies one packet for each write.
    const send = async (bytes: Uint8Array) => {
      while (bytes.length > 0) {
        const segment = getOption(fdOf(this.#below), TCP_MAXSEG);
        bytes = bytes.subarray(await this.#below.write(bytes.subarray(0, segment)));
      }
    };
    return new Duplex({
      read() {
        receive().then((piece) => this.push(piece), (error) => this.destroy(error));
      },
      write(bytes, _encoding, done) {
        send(bytes).then(() => done(), done);
      },
    });
  }

  #end(failure: Error | null): void {
    this.#isEnded = true;
    this.#failure ??= failure;
    this.#wakeReader();
  }

  /** Waits for the handshake. @throws {Deno.errors.InvalidData} it failed, in Deno's own words */
  async handshake(): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      const fail = (message: string) => reject(new Deno.errors.InvalidData(message));
      this.#socket.once("secureConnect", resolve);
      this.#socket.once("close", () => fail("the server closed the connection"));
      this.#socket.once("error", ({ code, message }: Error & { code?: string }) => {
        const isCertificate = /CERT|VERIFY|ISSUER|SIGNED/.test(code ?? "");
        fail(isCertificate ? BAD_CERTIFICATE + message : message);
      });
    });
  }

  /**
   * Reads available bytes into `buffer`.
   *
   * @returns the number of bytes, or `null` at the end, with or without close_notify
   * @throws {Deno.errors.BadResource} it is closed, or is closed meanwhile
   * @throws {Deno.errors.ConnectionReset} the other end has reset it
   */
  async read(buffer: Uint8Array): Promise<number | null> {
    while (this.#chunks.length === 0) {
      if (this.#failure !== null) throw this.#failure;
      if (this.#isEnded) return null;
      await new Promise<void>((resolve) => this.#wakeReader = resolve);
    }
    const [chunk] = this.#chunks;
    const size = Math.min(buffer.length, chunk.length);
    buffer.set(chunk.subarray(0, size));
    if (size === chunk.length) this.#chunks.shift();
    else this.#chunks[0] = chunk.subarray(size);
    if (this.#chunks.length === 0) this.#wakeTransport();
    return size;
  }

  /** Writes all of `bytes`. @returns how many they are */
  write(bytes: Uint8Array): Promise<number> {
    return new Promise((resolve, reject) => {
      this.#socket.write(bytes, (error) => error ? reject(error) : resolve(bytes.length));
    });
  }

  /** Sends close_notify, once all that was written has been sent; no more can be written. */
  async closeWrite(): Promise<void> {
    await new Promise<void>((resolve) => this.#socket.end(resolve));
  }

  /** Closes it and the connection below; reads and writes that wait end. */
  close(): void {
    this.#failure = new Deno.errors.BadResource("the connection is closed");
    this.#socket.destroy();
    this.#below.close();
    this.#wakeReader();
  }
}

/**
 * What arrives, split at the ends of TLS records (RFC 8446 section 5.1): Deno 2.9 loses what it has
 * decrypted from a piece if a record in it is bad.
 */
async function* splitRecords(below: Transport): AsyncGenerator<Uint8Array, null> {
  const buffer = new Uint8Array(64 * 1024);
  const header = new Uint8Array(5); // type, version, length
  let known = 0, missing = 0; // bytes of the header, and of the content
  for (let size; (size = await below.read(buffer)) !== null;) {
    for (let from = 0, to = 0; from < size; from = to) {
      while (known < header.length && to < size) {
        header[known++] = buffer[to++];
        if (known === header.length) missing = header[3] << 8 | header[4];
      }
      const count = Math.min(missing, size - to);
      to += count;
      missing -= count;
      if (known === header.length && missing === 0) known = 0;
      yield buffer.slice(from, to);
    }
  }
  return null;
}
