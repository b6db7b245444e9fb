/**
 * What the tests share: processes, servers, packets, namespaces. All of them real.
 *
 * @module
 */

import { open } from "../ffi/libc.ts";
import { fdOf } from "../ffi/mod.ts";

const decoder = new TextDecoder();

/** The script under test. */
export const MAIN = new URL("../main.ts", import.meta.url).pathname;

// ─── Tests that need more than Deno ──────────────────────────────────────────────────────────────────────────────────

/**
 * Declares a test that needs root or programs. Where they are missing it is skipped and its name says why; under
 * `CI=true` it runs and fails instead.
 */
export function testWith(needs: readonly string[], name: string, run: () => Promise<void>): void {
  const absent = missing(needs).join(", ");
  const ci = Deno.env.get("CI") === "true";
  if (absent === "") Deno.test(name, run);
  else if (ci) Deno.test(name, () => Promise.reject(new Error(`needs ${absent}`)));
  else Deno.test({ name: `${name} (skipped: needs ${absent})`, ignore: true, fn: run });
}

/** Those of the needs, root or programs, that are not there. */
export function missing(needs: readonly string[]): string[] {
  return needs.filter((need) => !has(need));
}

function has(need: string): boolean {
  if (need === "root") return Deno.uid() === 0;
  return folders().some((folder) => {
    try {
      return Deno.statSync(`${folder}/${need}`).isFile;
    } catch {
      return false;
    }
  });
}

/** Where programs are looked for, also by what is started from here. */
function folders(): string[] {
  // Debian keeps the system's own programs in sbin, which is not in everybody's PATH.
  const given = Deno.env.get("PATH") ?? "";
  const path = given.endsWith(SBIN) ? given : `${given}${SBIN}`;
  if (path !== given) Deno.env.set("PATH", path);
  return path.split(":");
}

const SBIN = ":/usr/sbin:/sbin";

// ─── Processes ───────────────────────────────────────────────────────────────────────────────────────────────────────

/** What a process left behind. */
export interface Outcome {
  code: number;
  signal: Deno.Signal | null;
  stdout: string;
  stderr: string;
  bytes: Uint8Array<ArrayBuffer>;
}

/** How a process is started. */
export interface How {
  /** Words before the program, such as `ip netns exec NAME`. */
  under?: readonly string[];
  /** Deno's own flags in place of the two permissions. */
  flags?: readonly string[];
  /** The environment, besides this process's. */
  env?: Record<string, string>;
}

const PERMISSIONS = ["--allow-net", "--allow-ffi"];

/** The words that run the script. */
export function command(args: readonly string[], how: How = {}): string[] {
  return [
    ...how.under ?? [],
    Deno.execPath(),
    "run",
    "--no-prompt",
    ...how.flags ?? PERMISSIONS,
    MAIN,
    ...args,
  ];
}

/** Runs the script to its end. */
export async function dscpGet(args: readonly string[], how: How = {}): Promise<Outcome> {
  return await execute(command(args, how), how.env);
}

/** Runs a program to its end. */
export async function execute(
  words: readonly string[],
  env: Record<string, string> = {},
): Promise<Outcome> {
  const process = new Deno.Command(words[0], {
    args: words.slice(1),
    env,
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  });
  const { code, signal, stdout, stderr } = await process.output();
  return {
    code,
    signal,
    stdout: decoder.decode(stdout),
    stderr: decoder.decode(stderr),
    bytes: stdout,
  };
}

/** Runs a program that must succeed. */
export async function succeed(...words: string[]): Promise<Outcome> {
  const outcome = await execute(words);
  if (outcome.code !== 0) {
    throw new Error(`${words.join(" ")}: exit ${outcome.code}: ${outcome.stderr}`);
  }
  return outcome;
}

/** A program that runs until it is disposed of, and what it has said so far. */
export class Background implements AsyncDisposable {
  readonly child: Deno.ChildProcess;
  #said = "";
  #changed = Promise.withResolvers<void>();
  #reading: Promise<unknown>;

  constructor(words: readonly string[], env: Record<string, string> = {}, cwd?: string) {
    this.child = new Deno.Command(words[0], {
      args: words.slice(1),
      env,
      cwd,
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    })
      .spawn();
    this.#reading = Promise.all([this.#read(this.child.stdout), this.#read(this.child.stderr)]);
  }

  async #read(stream: ReadableStream<Uint8Array<ArrayBuffer>>): Promise<void> {
    for await (const text of stream.pipeThrough(new TextDecoderStream())) {
      this.#said += text;
      this.#changed.resolve();
      this.#changed = Promise.withResolvers();
    }
  }

  /** Everything it has printed. */
  get said(): string {
    return this.#said;
  }

  /** Waits until what it has said passes; fails if it ends before. */
  async until(passes: (said: string) => boolean): Promise<string> {
    let ended = false;
    const end = this.#reading.then(() => ended = true);
    while (!passes(this.#said)) {
      if (ended) throw new Error(`ended before it said what was waited for: ${this.#said}`);
      await Promise.race([this.#changed.promise, end]);
    }
    return this.#said;
  }

  /** Ends it and waits for that. */
  async stop(signal: Deno.Signal = "SIGTERM"): Promise<Deno.CommandStatus> {
    try {
      this.child.kill(signal);
    } catch { /* it has ended */ }
    await this.#reading;
    return await this.child.status;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }
}

/** A copy of the script, and of Deno, that the user `nobody` may read wherever the originals are. */
export class Nobody implements AsyncDisposable {
  private constructor(readonly folder: string) {}

  static async create(): Promise<Nobody> {
    const folder = await Deno.makeTempDir({ prefix: "dscp-get-nobody-" });
    await Deno.chmod(folder, 0o755);
    const root = new URL("..", import.meta.url).pathname;
    await succeed("cp", "-r", `${root}main.ts`, `${root}ffi`, Deno.execPath(), folder);
    await succeed("chmod", "-R", "a+rX", folder);
    return new Nobody(folder);
  }

  /** The words that run the script as `nobody`. */
  get command(): string[] {
    const become = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"];
    const clean = ["env", "-i", `DENO_DIR=${this.folder}/none`];
    const deno = `${this.folder}/${Deno.execPath().split("/").at(-1)}`;
    return [
      ...become,
      ...clean,
      deno,
      "run",
      "--no-prompt",
      ...PERMISSIONS,
      `${this.folder}/main.ts`,
    ];
  }

  /** Starts the far end as `nobody`. */
  async serve(): Promise<FarEnd> {
    return await FarEnd.of([...this.command, "--serve", "0"]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder, { recursive: true });
  }
}

// ─── Servers ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A server that does with each connection what a test says. */
export class RawServer implements AsyncDisposable {
  readonly listener: Deno.TcpListener;
  readonly port: number;
  /** What the clients sent first. */
  readonly requests: string[] = [];
  #serving: Promise<void>;

  constructor(
    handle: (conn: Deno.TcpConn, server: RawServer) => Promise<void>,
    hostname = "127.0.0.1",
  ) {
    this.listener = Deno.listen({ hostname, port: 0 });
    this.port = this.listener.addr.port;
    this.#serving = this.#serve(handle);
  }

  async #serve(handle: (conn: Deno.TcpConn, server: RawServer) => Promise<void>): Promise<void> {
    const open: Promise<void>[] = [];
    for await (const conn of this.listener) {
      const handled = handle(conn, this).catch((error) => {
        // The client may go whenever it likes.
        if (
          !(error instanceof Deno.errors.ConnectionReset || error instanceof Deno.errors.BrokenPipe)
        ) throw error;
      }).finally(() => {
        try {
          conn.close();
        } catch { /* the test closed it */ }
      });
      open.push(handled);
    }
    await Promise.all(open);
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

/** Reads a request's head, and keeps it. */
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

/** Writes all of it. */
export async function send(conn: Deno.Conn, data: string | Uint8Array): Promise<void> {
  const bytes = typeof data === "string" ? latin1(data) : data;
  for (let sent = 0; sent < bytes.length;) sent += await conn.write(bytes.subarray(sent));
}

/** A byte a character. */
export function latin1(text: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(text, (c) => c.charCodeAt(0));
}

/** A server that reads the request, sends these pieces and closes. */
export function replying(...pieces: (string | Uint8Array)[]): RawServer {
  return replyingOn("127.0.0.1", ...pieces);
}

/** The same on another address. */
export function replyingOn(hostname: string, ...pieces: (string | Uint8Array)[]): RawServer {
  return new RawServer(async (conn, server) => {
    await readRequest(conn, server);
    for (const piece of pieces) await send(conn, piece);
  }, hostname);
}

/** Resets a connection: connect(2) to no address. Closing it would say goodbye first. */
export function reset(conn: Deno.Conn): void {
  const AF_UNSPEC = 0;
  const libc = open("libc.so.6", {
    connect: { parameters: ["i32", "buffer", "u32"], result: "i32" },
  });
  libc.symbols.connect(fdOf(conn), new Uint16Array([AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0]), 16);
  libc.close();
}

/** A port that nobody listens on now. */
export function closedPort(hostname = "127.0.0.1"): number {
  using listener = Deno.listen({ hostname, port: 0 });
  return listener.addr.port;
}

/** The script as the far end, on a port of its own. */
export class FarEnd implements AsyncDisposable {
  private constructor(readonly process: Background, readonly port: number) {}

  static async start(where = "0", under: readonly string[] = []): Promise<FarEnd> {
    return await FarEnd.of(command(["--serve", where], { under }));
  }

  /** Starts it with these words, and waits until it listens. */
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

/** A root of our own and a certificate for localhost and 127.0.0.1 by it, in a folder that is gone when disposed of. */
export class Certificates implements AsyncDisposable {
  private constructor(readonly folder: string) {}

  static async create(): Promise<Certificates> {
    const made = new Certificates(await Deno.makeTempDir({ prefix: "dscp-get-" }));
    const { folder, root, key, certificate } = made;
    await Deno.chmod(folder, 0o755);
    const openssl = (...words: string[]) => succeed("openssl", ...words);
    const request = ["req", "-newkey", "rsa:2048", "-nodes"];
    await openssl(
      ...request,
      "-x509",
      "-keyout",
      `${folder}/root.key`,
      "-out",
      root,
      "-subj",
      "/CN=Test root",
    );
    await openssl(...request, "-keyout", key, "-out", `${folder}/csr`, "-subj", "/CN=localhost");
    await Deno.writeTextFile(`${folder}/ext`, "subjectAltName=DNS:localhost,IP:127.0.0.1\n");
    const by = [
      "-CA",
      root,
      "-CAkey",
      `${folder}/root.key`,
      "-CAcreateserial",
      "-extfile",
      `${folder}/ext`,
    ];
    await openssl("x509", "-req", "-in", `${folder}/csr`, ...by, "-out", certificate);
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

// ─── Packets ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A packet as tcpdump saw it. */
export interface Seen {
  tos: number;
  from: number;
  to: number;
  /** As tcpdump writes them: `S`, `S.`, `.`, `P.`, `F.`, `R`. */
  flags: string;
  length: number;
}

/** tcpdump at work, for one port. */
export class Capture implements AsyncDisposable {
  #tcpdump: Background;

  private constructor(tcpdump: Background) {
    this.#tcpdump = tcpdump;
  }

  /** Starts it, and waits until it sees packets. */
  static async start(port: number, device = "lo", under: readonly string[] = []): Promise<Capture> {
    const words = [
      ...under,
      "tcpdump",
      "-i",
      device,
      "-n",
      "-v",
      "-l",
      "-U",
      "--immediate-mode",
      `tcp port ${port}`,
    ];
    const tcpdump = new Background(words);
    await tcpdump.until((said) => said.includes("listening on"));
    return new Capture(tcpdump);
  }

  /** What it has seen. */
  get packets(): Seen[] {
    const pattern =
      /^(?:\S+ )?IP6? \((?:tos (0x[0-9a-f]+)|class (0x[0-9a-f]+)|)[^\n]*?\)(?:\n +| )\S+\.(\d+) > \S+\.(\d+): Flags \[([^\]]+)\].*length (\d+)/gm;
    return [...this.#tcpdump.said.matchAll(pattern)].map((
      [, tos, trafficClass, from, to, flags, length],
    ) => ({
      tos: Number(tos ?? trafficClass ?? 0),
      from: Number(from),
      to: Number(to),
      flags,
      length: Number(length),
    }));
  }

  /** Waits until what it has seen passes. */
  async until(passes: (packets: Seen[]) => boolean): Promise<Seen[]> {
    await this.#tcpdump.until(() => passes(this.packets));
    return this.packets;
  }

  /** Waits for the end of a connection: both FINs and the ACK of the second, or a reset. */
  async connection(): Promise<Seen[]> {
    return await this.until((packets) => {
      const fins = packets.flatMap(({ flags }, at) => flags.includes("F") ? [at] : []);
      return packets.some(({ flags }) => flags.includes("R")) ||
        (fins.length >= 2 &&
          packets.slice(fins[1] + 1).some(({ from }) => from !== packets[fins[1]].from));
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#tcpdump[Symbol.asyncDispose]();
  }
}

// ─── Namespaces ──────────────────────────────────────────────────────────────────────────────────────────────────────

let namespaces = 0;

/** A network namespace of our own, gone when disposed of. */
export class Namespace implements AsyncDisposable {
  private constructor(readonly name: string) {}

  /** Makes one, with its loopback up. */
  static async create(): Promise<Namespace> {
    const namespace = new Namespace(`dscp-get-${Deno.pid}-${namespaces++}`);
    await succeed("ip", "netns", "add", namespace.name);
    await namespace.run("ip", "link", "set", "lo", "up");
    return namespace;
  }

  /** The words that run a program inside. */
  get under(): string[] {
    return ["ip", "netns", "exec", this.name];
  }

  /** Runs a program inside; it must succeed. */
  async run(...words: string[]): Promise<Outcome> {
    return await succeed(...this.under, ...words);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // Whoever still runs inside would keep the namespace alive after its name is gone.
    const { stdout } = await execute(["ip", "netns", "pids", this.name]);
    for (const pid of stdout.split("\n").filter((line) => line !== "")) {
      try {
        Deno.kill(Number(pid), "SIGKILL");
      } catch { /* it has ended */ }
    }
    await succeed("ip", "netns", "delete", this.name);
  }
}
