/**
 * Servers for the script to ask: scripted ones in this process, the script as the far end, nginx and
 * Python; with the replies, ports and certificates that they use.
 *
 * @module
 */

import { connect } from "../../ffi/libc.ts";
import { fdOf } from "../../ffi/mod.ts";
import { Background, command, succeed } from "./processes.ts";

const decoder = new TextDecoder();

// ─── Scripted servers ────────────────────────────────────────────────────────────────────────────

/** A complete small reply, for tests that are not about the reply. */
export const OK = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/** A server that handles each connection as a test says. */
export class RawServer implements AsyncDisposable {
  readonly listener: Deno.TcpListener;
  readonly port: number;
  /** The heads of the requests, in order, as {@linkcode readRequest} adds them. */
  readonly requests: string[] = [];
  #serving: Promise<void>;
  #open: Promise<void>[] = [];

  constructor(
    handle: (conn: Deno.TcpConn, server: RawServer) => Promise<void>,
    hostname = "127.0.0.1",
  ) {
    this.listener = Deno.listen({ hostname, port: 0 });
    this.port = this.listener.addr.port;
    this.#serving = this.#serve(handle);
  }

  async #serve(handle: (conn: Deno.TcpConn, server: RawServer) => Promise<void>): Promise<void> {
    for await (const conn of this.listener) {
      const handled = handle(conn, this).catch((error) => {
        // A client may leave at any time.
        if (
          !(error instanceof Deno.errors.ConnectionReset || error instanceof Deno.errors.BrokenPipe)
        ) throw error;
      }).finally(() => {
        try {
          conn.close();
        } catch { /* the test closed it */ }
      });
      this.#open.push(handled);
    }
    await this.allClosed();
  }

  /** Waits until this end of every connection so far is closed. */
  async allClosed(): Promise<void> {
    await Promise.all(this.#open);
  }

  /** `http://127.0.0.1:PORT/` */
  get url(): string {
    const { hostname } = this.listener.addr;
    return `http://${hostname.includes(":") ? `[${hostname}]` : hostname}:${this.port}/`;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.listener.close();
    await this.#serving;
  }
}

/** Reads the head of a request and adds it to the server's list. */
export async function readRequest(conn: Deno.Conn, server?: RawServer): Promise<string> {
  const buffer = new Uint8Array(65536);
  let text = "";
  while (!text.includes("\r\n\r\n")) {
    const size = await conn.read(buffer);
    if (size === null) break;
    text += decoder.decode(buffer.subarray(0, size));
  }
  server?.requests.push(text);
  return text;
}

/** Writes all of the data. */
export async function send(conn: Deno.Conn, data: string | Uint8Array): Promise<void> {
  const bytes = typeof data === "string" ? latin1(data) : data;
  for (let sent = 0; sent < bytes.length;) sent += await conn.write(bytes.subarray(sent));
}

/** Encodes a text, one byte per character. */
export function latin1(text: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(text, (c) => c.charCodeAt(0));
}

/** A server that reads a request, sends these pieces and closes the connection. */
export function replying(...pieces: (string | Uint8Array)[]): RawServer {
  return replyingOn("127.0.0.1", ...pieces);
}

/** {@linkcode replying} on another address. */
export function replyingOn(hostname: string, ...pieces: (string | Uint8Array)[]): RawServer {
  return new RawServer(async (conn, server) => {
    await readRequest(conn, server);
    for (const piece of pieces) await send(conn, piece);
  }, hostname);
}

/** Resets a connection. connect(2) with AF_UNSPEC sends RST; close(2) would send FIN. */
export function reset(conn: Deno.Conn): void {
  const AF_UNSPEC = 0;
  connect(fdOf(conn), new Uint8Array(16).fill(AF_UNSPEC));
}

/**
 * A server, behind TLS if it is given certificates, that sends a head and then a piece again and
 * again until the client is gone. After five seconds it gives up and ends its reply: clients with a
 * limit are gone by then.
 */
export class EndlessServer implements AsyncDisposable {
  /** Whether a client stayed until the end. */
  gaveUp = false;
  /** Bytes sent so far. */
  sent = 0;
  /** `http` or `https`, `//127.0.0.1:PORT/` */
  readonly url: string;
  readonly #listener: Deno.Listener<Deno.Conn>;
  readonly #serving: Promise<void>;

  constructor(head: string, piece: string, end: string, certificates?: Certificates) {
    const where = { hostname: "127.0.0.1", port: 0 };
    if (certificates === undefined) this.#listener = Deno.listen(where);
    else {
      const key = Deno.readTextFileSync(certificates.key);
      const cert = Deno.readTextFileSync(certificates.certificate);
      this.#listener = Deno.listenTls({ ...where, key, cert });
    }
    const { port } = this.#listener.addr as Deno.NetAddr;
    this.url = `${certificates === undefined ? "http" : "https"}://127.0.0.1:${port}/`;
    this.#serving = this.#serve(head, latin1(piece), end);
  }

  async #serve(head: string, piece: Uint8Array, end: string): Promise<void> {
    for await (using conn of this.#listener) {
      try {
        await readRequest(conn);
        const giveUp = performance.now() + 5000;
        await send(conn, head);
        while (performance.now() < giveUp) {
          await send(conn, piece);
          this.sent += piece.length;
        }
        this.gaveUp = true;
        await send(conn, end);
      } catch { /* the client is gone */ }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#listener.close();
    await this.#serving;
  }
}

/** Heads of replies without end, the pieces to send again and again, and what would end them. */
export const ENDLESS: Record<string, [head: string, piece: string, end: string]> = {
  "a body without length": ["HTTP/1.1 200 OK\r\n\r\n", "x".repeat(1 << 20), ""],
  "chunks of one byte": [
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "1\r\nx\r\n".repeat(100_000),
    "0\r\n\r\n",
  ],
};

/** Returns a port on which no process listens. */
export function closedPort(hostname = "127.0.0.1"): number {
  using listener = Deno.listen({ hostname, port: 0 });
  return listener.addr.port;
}

// ─── Programs that serve ─────────────────────────────────────────────────────────────────────────

/** The script as the far end. */
export class FarEnd implements AsyncDisposable {
  private constructor(readonly process: Background, readonly port: number) {}

  /** Starts it on a place, by default 127.0.0.1 and a free port. */
  static async start(where = "0", under: readonly string[] = []): Promise<FarEnd> {
    return await FarEnd.of(command(["--serve", where], { under }));
  }

  /** Starts it by this command line and waits until it listens. */
  static async of(words: readonly string[]): Promise<FarEnd> {
    const process = new Background(words);
    const said = await process.until((said) => said.includes("Ctrl-C"));
    return new FarEnd(process, Number(/:(\d+);/.exec(said)![1]));
  }

  /** `http://127.0.0.1:PORT/` */
  get url(): string {
    return `http://127.0.0.1:${this.port}/`;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.process[Symbol.asyncDispose]();
  }
}

/**
 * Starts nginx and waits until it serves. Its configuration and temporary files are in `folder`.
 *
 * @param http directives of the http block, with its servers
 */
export async function startNginx(
  folder: string,
  http: string,
  under: readonly string[] = [],
): Promise<Background> {
  const temporary = "client_body proxy fastcgi uwsgi scgi".split(" ").map((kind) =>
    `${kind}_temp_path ${folder}/${kind};`
  );
  await Deno.writeTextFile(
    `${folder}/nginx.conf`,
    `daemon off; pid ${folder}/pid; error_log stderr notice; worker_processes 1;
    events { worker_connections 4096; }
    http { access_log off; ${temporary.join(" ")} ${http} }`,
  );
  const server = new Background([...under, "nginx", "-c", `${folder}/nginx.conf`, "-e", "stderr"]);
  await server.until((said) => said.includes("start worker process"));
  return server;
}

/** Starts Python's http.server with these arguments and waits until it listens. */
export async function startPython(
  args: readonly string[],
  under: readonly string[] = [],
): Promise<Background> {
  const server = new Background([...under, ..."python3 -u -m http.server".split(" "), ...args]);
  await server.until((said) => said.includes("Serving HTTP"));
  return server;
}

/**
 * A root certificate for tests and a server certificate by it for localhost, server.example and
 * 127.0.0.1. Their folder is removed when disposed of.
 */
export class Certificates implements AsyncDisposable {
  private constructor(readonly folder: string) {}

  static async create(): Promise<Certificates> {
    const made = new Certificates(await Deno.makeTempDir({ prefix: "dscp-get-" }));
    const { folder, root, key, certificate } = made;
    await Deno.chmod(folder, 0o755);
    const openssl = (...words: string[]) => succeed("openssl", ...words);
    const [rootKey, csr, extensions] = [`${folder}/root.key`, `${folder}/csr`, `${folder}/ext`];
    const request = "req -newkey rsa:2048 -nodes".split(" ");
    await openssl(...request, "-x509", "-keyout", rootKey, "-out", root, "-subj", "/CN=Test root");
    await openssl(...request, "-keyout", key, "-out", csr, "-subj", "/CN=localhost");
    await Deno.writeTextFile(
      extensions,
      "subjectAltName=DNS:localhost,DNS:server.example,IP:127.0.0.1\n",
    );
    const by = ["-CA", root, "-CAkey", rootKey, "-CAcreateserial", "-extfile", extensions];
    await openssl("x509", "-req", "-in", csr, ...by, "-out", certificate);
    return made;
  }

  /** The root's certificate, for `--cacert`. */
  get root(): string {
    return `${this.folder}/root.pem`;
  }

  /** The server's key. */
  get key(): string {
    return `${this.folder}/key`;
  }

  /** The server's certificate. */
  get certificate(): string {
    return `${this.folder}/pem`;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder, { recursive: true });
  }
}
