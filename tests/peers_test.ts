import assert from "node:assert/strict";
import { dial } from "../ffi/mod.ts";
import { get, type Reply, type Sink, trace } from "../main.ts";
import { Folder } from "./support/folder.ts";
import {
  Background,
  command,
  dscpGet,
  execute,
  openDescriptors,
  testWith,
} from "./support/processes.ts";
import {
  Certificates,
  closedPort,
  RawServer,
  readRequest,
  replying,
  send,
  startNginx,
  startPython,
} from "./support/servers.ts";

/** A folder with files to serve. */
async function filesToServe(): Promise<Folder> {
  const folder = await Folder.create();
  const { path } = folder;
  await Deno.chmod(path, 0o755);
  await Deno.writeTextFile(`${path}/index.html`, "<p>hello\n");
  await Deno.writeFile(`${path}/every`, Uint8Array.from({ length: 300_000 }, (_, at) => at * 31));
  await Deno.writeTextFile(`${path}/empty`, "");
  return folder;
}

/** The same status, headers and body, byte for byte, as curl gets; `path` marks the handshake, or not. */
async function sameAsCurl(
  url: string,
  flags: readonly string[] = [],
  more: readonly string[] = [],
): Promise<void> {
  const allowed = { flags: ["--allow-net", "--allow-ffi", ...flags] };
  for (const path of ["", "every", "empty", "missing"]) {
    const write = "%{stderr}%{http_code} %{header_json}";
    const quiet = ["-s", "-H", "Connection: close", "--write-out", write];
    const curl = await execute(["curl", ...quiet, ...more, url + path]);
    const [, status, headers] = /^(\d+) ([^]*)$/.exec(curl.stderr)!;
    const ours = await dscpGet(["--json", ...more, url + path], allowed);
    assert.equal(ours.code, 0, ours.stderr);
    const { reply, sent } = JSON.parse(ours.stdout);
    assert.deepEqual([String(reply.status), reply.bodyBytes], [status, curl.bytes.length]);
    assert.equal(sent.proved, true);
    assert.deepEqual(
      grouped(reply.headers),
      Object.entries(JSON.parse(headers)).filter(([name]) => name !== "date"),
    );
    for (const how of [[], ["--mark-syn"]]) {
      const silent = await dscpGet(["-s", ...how, ...more, url + path], allowed);
      assert.equal(silent.code, 0, `${how} ${path}: ${silent.stderr}`);
      assert.deepEqual(silent.bytes, curl.bytes);
    }
  }
}

/** Headers in the form of curl's `header_json`, without the clock's. */
function grouped(headers: [string, string][]): [string, string[]][] {
  const byName = Map.groupBy(headers, ([name]) => name);
  byName.delete("date");
  return [...byName].map(([name, all]) => [name, all.map(([, value]) => value)]);
}

testWith(["python3", "curl"], "Python's http.server gives us what it gives curl", async () => {
  await using folder = await filesToServe();
  const args = ["--bind", "127.0.0.1", "--directory", folder.path, "0"];
  await using server = await startPython(args);
  await sameAsCurl(`http://127.0.0.1:${/port (\d+)/.exec(server.said)![1]}/`);
});

testWith(
  ["nginx", "curl"],
  "nginx gives us what it gives curl: from files, in chunks through a proxy",
  async () => {
    await using folder = await filesToServe();
    const [port, proxy] = [closedPort(), closedPort()];
    await using _server = await startNginx(
      folder.path,
      `server { listen 127.0.0.1:${port}; root ${folder.path}; ssi on; ssi_types *; keepalive_timeout 60; }
      server {
        listen 127.0.0.1:${proxy};
        location / { proxy_pass http://127.0.0.1:${port}; proxy_http_version 1.1; }
      }`,
    );
    await sameAsCurl(`http://127.0.0.1:${port}/`);
    const { reply } = JSON.parse(
      (await dscpGet(["--json", `http://127.0.0.1:${proxy}/every`])).stdout,
    );
    assert.ok(
      reply.headers.some(([name, value]: string[]) =>
        name === "transfer-encoding" && value === "chunked"
      ),
    );
    await sameAsCurl(`http://127.0.0.1:${proxy}/`);
  },
);

testWith(["nginx", "openssl", "curl"], "nginx gives us over https what it gives curl", async () => {
  await using folder = await filesToServe();
  await using certificates = await Certificates.create();
  const port = closedPort();
  await using _server = await startNginx(
    folder.path,
    `ssl_certificate ${certificates.certificate}; ssl_certificate_key ${certificates.key};
    server { listen 127.0.0.1:${port} ssl; root ${folder.path}; }`,
  );
  await sameAsCurl(`https://localhost:${port}/`, ["--allow-read"], ["--cacert", certificates.root]);
  await sameAsCurl(`https://127.0.0.1:${port}/`, [], ["-k"]);
});

testWith(["openssl", "curl"], "openssl's s_server gives us what it gives curl", async () => {
  await using folder = await filesToServe();
  await using certificates = await Certificates.create();
  const port = closedPort();
  const { certificate, key } = certificates;
  const serve = ["openssl", "s_server", "-accept", `127.0.0.1:${port}`, "-WWW"];
  const words = [...serve, "-cert", certificate, "-key", key];
  await using server = new Background(words, {}, folder.path);
  await server.until((said) => said.includes("ACCEPT"));
  const curl = await execute(["curl", "-s", "-k", `https://127.0.0.1:${port}/every`]);
  assert.equal(curl.bytes.length, 300_000);
  for (const how of [[], ["--mark-syn"]]) {
    const url = `https://127.0.0.1:${port}/every`;
    const { code, bytes, stderr } = await dscpGet(["-s", "-k", ...how, url]);
    assert.equal(code, 0, stderr);
    assert.deepEqual(bytes, curl.bytes);
  }
});

testWith(
  ["node", "curl"],
  "Node's http gives us what it gives curl, keep-alive or not",
  async () => {
    await using folder = await filesToServe();
    const script = `const fs = require("node:fs");
    const server = require("node:http").createServer((request, reply) => {
      const file = process.argv[1] + (request.url === "/" ? "/index.html" : request.url);
      if (!fs.existsSync(file)) { reply.statusCode = 404; return reply.end("nothing here\\n"); }
      fs.createReadStream(file).pipe(reply);
    }).listen(0, "127.0.0.1", () => console.log("port", server.address().port));`;
    await using server = new Background(["node", "-e", script, folder.path]);
    const said = await server.until((said) => said.includes("port "));
    const url = `http://127.0.0.1:${/port (\d+)/.exec(said)![1]}/`;
    await sameAsCurl(url);
    // With keep-alive the end of the body is not the end of the connection.
    const kept = await dscpGet(["-s", "-H", "Connection: keep-alive", `${url}every`]);
    assert.deepEqual(kept.bytes, await Deno.readFile(`${folder.path}/every`));
  },
);

testWith(["curl"], "Deno.serve gives us what it gives curl", async () => {
  await using folder = await filesToServe();
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async (request) => {
    const { pathname } = new URL(request.url);
    try {
      const file = await Deno.open(folder.path + (pathname === "/" ? "/index.html" : pathname));
      return new Response(file.readable);
    } catch {
      return new Response("nothing here\n", { status: 404 });
    }
  });
  await sameAsCurl(`http://127.0.0.1:${server.addr.port}/`);
  await server.shutdown();
});

for (
  const [program, words] of [
    ["nc", (port: number) => ["nc", "-N", "-l", "-v", "127.0.0.1", String(port)]],
    ["socat", (port: number) => ["socat", "-d", "-d", "-", `TCP-LISTEN:${port},bind=127.0.0.1`]],
  ] as const
) {
  testWith([program, "bash"], `a reply out of ${program} is read to its end`, async () => {
    for (const path of [[], ["--mark-syn"]]) {
      const port = closedPort();
      const serve = words(port).map((word) => `'${word}'`).join(" ");
      const script = `printf 'HTTP/1.0 200 OK\\r\\n\\r\\nhello' | ${serve}`;
      await using server = new Background(["bash", "-c", script]);
      await server.until((said) => /listening/i.test(said));
      const { code, stdout, stderr } = await dscpGet(["-s", ...path, `http://127.0.0.1:${port}/`]);
      assert.deepEqual([code, stdout], [0, "hello"], stderr);
    }
  });
}

Deno.test("a thousand requests in one process, good and failing, leave as many descriptors open as before", async () => {
  let served = 0;
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    const length = served++ % 4 === 0 ? 9 : 2; // each fourth reply ends early
    await send(conn, `HTTP/1.1 200 OK\r\nContent-Length: ${length}\r\n\r\nok`);
  });
  let failures = 0;
  const once = () =>
    get(server.url).then(({ sent }) => assert.equal(sent.packets[0].tos, 0xb8), () => failures++);
  await once();
  await server.allClosed();
  const before = openDescriptors();
  for (let at = 0; at < 999; at++) await once();
  assert.equal(failures, 250);
  await server.allClosed();
  assert.equal(openDescriptors(), before);
});

testWith(["python3"], "a body of 1 GiB passes in constant memory", async () => {
  const piece = new Uint8Array(1 << 20).fill(0x61);
  let pieces = 0;
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    const length = pieces === 0 ? 1024 : pieces * piece.length;
    await send(conn, `HTTP/1.1 200 OK\r\nContent-Length: ${length}\r\n\r\n`);
    if (pieces === 0) await send(conn, piece.subarray(0, length));
    for (let at = 0; at < pieces; at++) await send(conn, piece);
  });
  const measure = `import resource, subprocess, sys
out = subprocess.Popen(["wc", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
code = subprocess.run(sys.argv[1:], stdout=out.stdin, stderr=subprocess.DEVNULL).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
out.stdin.close()
print(code, peak, int(out.stdout.read()))`;
  const run = async (count: number): Promise<number[]> => {
    pieces = count;
    const { stdout, stderr } = await execute(["python3", "-c", measure, ...command([server.url])]);
    assert.equal(stderr, "");
    return stdout.trim().split(" ").map(Number);
  };
  const [smallCode, small] = await run(0);
  const [code, large, size] = await run(1024);
  assert.deepEqual([smallCode, code, size], [0, 0, 2 ** 30]);
  assert.ok(large - small <= 16 * 1024, `${large - small} KiB more`);
});

Deno.test("a program's own sink gets head and body, also where its methods are those of a class", async () => {
  class Collector implements Sink {
    readonly lines: string[] = [];
    status = 0;
    text = "";
    head(line: string): void {
      this.lines.push(line);
    }
    begin({ status }: Reply): void {
      this.status = status;
    }
    body(piece: Uint8Array): void {
      this.text += new TextDecoder().decode(piece);
    }
  }
  await using server = replying("HTTP/1.1 203 Fine\r\nContent-Length: 2\r\n\r\nok");
  const sink = new Collector();
  await get(server.url, {}, sink);
  const head = ["HTTP/1.1 203 Fine\r\n", "Content-Length: 2\r\n", "\r\n"];
  assert.deepEqual([sink.lines, sink.status, sink.text], [head, 203, "ok"]);
});

Deno.test("what a program's own sink throws comes out as it is, and the connection is closed", async () => {
  await using server = replying("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
  const open = openDescriptors();
  const fail = () => {
    throw new TypeError("mine");
  };
  const reject = () => Promise.reject(new TypeError("mine"));
  const sinks: Sink[] = [{ head: fail }, { head: reject }, { begin: fail }, { body: fail }, {
    body: reject,
  }];
  for (const sink of sinks) {
    await assert.rejects(get(server.url, {}, sink), { name: "TypeError", message: "mine" });
  }
  await server.allClosed();
  assert.equal(openDescriptors(), open);
});

Deno.test("a program may leave options undefined and give a URL; what makes no sense is a RangeError", async () => {
  await using server = replying("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
  const url = new URL(server.url);
  const none = { headers: undefined, maxTime: undefined, connectTimeout: undefined };
  assert.equal((await get(url, none)).reply!.status, 200);
  const path = await trace(url, none);
  for await (const { answer } of path) assert.equal(answer, "connected");
  assert.equal(path.failure, null);
  for (const maxTime of [NaN, -1, Infinity]) {
    await assert.rejects(get(url, { maxTime }), RangeError);
    await assert.rejects(trace(url, { maxTime }), RangeError);
  }
  await assert.rejects(dial({ hostname: "127.0.0.1", port: 70000, tos: null }), RangeError);
});
