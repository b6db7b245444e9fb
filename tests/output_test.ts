import assert from "node:assert/strict";
import { silent } from "./support/namespaces.ts";
import {
  Background,
  command,
  dscpGet,
  execute,
  onTerminal,
  testWith,
} from "./support/processes.ts";
import { closedPort, OK, RawServer, readRequest, replying, send } from "./support/servers.ts";

Deno.test("-s silences the report, not the errors", async () => {
  await using server = replying(OK);
  assert.deepEqual((await dscpGet(["-s", server.url])).stderr, "");
  assert.match(
    (await dscpGet(["-s", `http://127.0.0.1:${closedPort()}/`])).stderr,
    /^dscp-get: cannot connect/,
  );
});

Deno.test("--json puts one object in the documented form on standard output, and no body", async () => {
  await using server = replying("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789");
  const { code, stdout, stderr } = await dscpGet(["--json", "-d", "af41", `${server.url}x?y#z`]);
  assert.deepEqual([code, stderr], [0, ""]);
  assert.equal(stdout.trimEnd().split("\n").length, 1);
  const { time, local, milliseconds, sent, descriptor, reply, ...rest } = JSON.parse(stdout);
  assert.equal(new Date(time).toISOString(), time);
  // Which byte the reply came with is known to a process with CAP_NET_RAW.
  const { tos, ...plain } = reply;
  assert.ok(tos === undefined || tos === 0);
  assert.deepEqual({ ...rest, reply: plain }, {
    url: `${server.url}x?y`,
    server: "remote",
    remote: { address: "127.0.0.1", port: server.port },
    mark: {
      name: "AF41",
      dscp: 34,
      tos: 136,
      readBack: 136,
      handshake: false,
      handshakeProved: null,
    },
    arrived: null,
    returned: { sent: null, arrived: tos ?? null, kept: null },
    reply: {
      status: 200,
      reason: "OK",
      headers: [["content-length", "10"]],
      bodyBytes: 10,
      complete: true,
    },
  });
  assert.equal(local.address, "127.0.0.1");
  assert.deepEqual([sent.proved, descriptor > 2], [true, true]);
  const { connect, firstByte, total } = milliseconds;
  assert.ok(0 < connect && connect <= firstByte && firstByte <= total);
});

Deno.test("standard output that is closed is 23, without a word about it", async () => {
  const every = new Uint8Array(1 << 20);
  await using server = replying(
    `HTTP/1.1 200 OK\r\nContent-Length: ${every.length}\r\n\r\n`,
    every,
  );
  for (const args of [[], ["--json"], ["--help"]]) {
    const words = command([...args, server.url]).map((word) => `'${word}'`).join(" ");
    const { stdout, stderr } = await execute([
      "bash",
      "-c",
      `exec 3>&1; (${words}; echo $? >&3) | true`,
    ]);
    assert.equal(stdout, args[0] === "--help" && stdout === "0\n" ? "0\n" : "23\n");
    if (args.length === 0) assert.match(stderr, /^sent .*: proved$/m);
    else assert.equal(stderr, "");
    assert.ok(!stderr.includes("dscp-get:"), stderr);
  }
});

Deno.test("standard output that is full is 23, and says so", async () => {
  await using server = replying(OK);
  for (const args of [[], ["--json"], ["-V"]]) {
    const words = command([...args, server.url]).map((word) => `'${word}'`).join(" ");
    const { stderr } = await execute(["bash", "-c", `${words} >/dev/full; echo $? >&2`]);
    assert.match(
      stderr,
      /dscp-get: cannot write to standard output: no space left on device\n23\n$/,
    );
  }
});

testWith(["script"], "colour only on a terminal that has some, and without NO_COLOR", async () => {
  await using server = replying(OK);
  const words = command(["-d", "cs1", server.url]).join(" ");
  const onOne = onTerminal(words);
  assert.ok((await execute(["env", "-u", "NO_COLOR", ...onOne])).stdout.includes("\x1b[1mmark"));
  assert.ok(
    !(await execute(["env", "NO_COLOR=1", ...onOne])).stdout.includes("\x1b["),
  );
  assert.ok(!(await dscpGet([server.url])).stderr.includes("\x1b["));
  const dumb = ["env", "-u", "NO_COLOR", "TERM=dumb"];
  assert.ok(!(await execute([...dumb, ...onOne])).stdout.includes("\x1b["));
  // What is proved is green and what is not the mark red, whatever the server's reason says.
  const head = "HTTP/1.1 200 proved\r\nContent-Length: 0\r\n";
  await using boasting = replying(`${head}\r\n`),
    changed = replying(`${head}Arrived-Data: 0x20\r\n\r\n`);
  for (
    const [{ url }, colored] of [[boasting, ["32mproved"]], [changed, [
      "32mproved",
      "31mNOT the mark",
    ]]] as const
  ) {
    const words = onTerminal(command([url]).join(" "));
    const { stdout } = await execute(["env", "-u", "NO_COLOR", ...words]);
    const found = stdout.split("\x1b[").filter((part) => /^3[12]m/.test(part));
    assert.deepEqual(found, colored, stdout);
  }
  // Nor does a live table move the cursor.
  const series = onTerminal(command(["-d", "ef,df", "-n", "30", server.url]).join(" "));
  const { stdout, code } = await execute([...dumb, ...series]);
  assert.deepEqual([code, stdout.includes("\x1b[")], [0, false], stdout);
});

testWith(
  ["python3"],
  "a standard output that a parent has made non-blocking gets every byte once",
  async () => {
    const size = 5_000_000;
    const bytes = Uint8Array.from({ length: size }, (_, at) => at * 31 >> 3);
    await using server = replying(`HTTP/1.1 200 OK\r\nContent-Length: ${size}\r\n\r\n`, bytes);
    const slowReader = `import fcntl, hashlib, os, subprocess, sys
read, write = os.pipe()
fcntl.fcntl(write, fcntl.F_SETFL, fcntl.fcntl(write, fcntl.F_GETFL) | os.O_NONBLOCK)
run = subprocess.Popen(sys.argv[1:], stdout=write)
os.close(write)
got = hashlib.sha256()
while piece := os.read(read, 1000): got.update(piece)
print(run.wait(), got.hexdigest())`;
    const { stdout } = await execute(["python3", "-c", slowReader, ...command(["-s", server.url])]);
    const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).toHex();
    assert.equal(stdout, `0 ${hash}\n`);
  },
);

Deno.test("a reply that takes long is waited for with what is known: both ends and the mark", async () => {
  const goOn = Promise.withResolvers<void>();
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    await goOn.promise;
    await send(conn, OK);
  });
  await using run = new Background(command([server.url]));
  await run.until((said) => /^mark .*\n$/m.test(said));
  assert.match(run.said, /^connected .*\nmark .*\n$/);
  goOn.resolve();
  await run.until((said) => said.includes("handshake "));
  for (const label of ["connected", "mark", "sent", "reply"]) {
    assert.equal(run.said.split(label.padEnd(11)).length, 2, run.said);
  }
});

Deno.test("a single request that a signal ends prints what is known: 130 or 143", async () => {
  for (
    const [args, signal, exit, known] of [
      [["--json"], "SIGINT", 130, /"readBack":184.*"code":130/],
      [[], "SIGINT", 130, /^mark +EF/m],
      [["--json"], "SIGTERM", 143, /"readBack":184.*"code":143/],
    ] as const
  ) {
    const reached = Promise.withResolvers<void>();
    await using server = new RawServer(async (conn) => {
      await readRequest(conn);
      reached.resolve();
      await conn.read(new Uint8Array(1));
    });
    await using run = new Background(command([...args, server.url]));
    await reached.promise;
    const { code } = await run.stop(signal);
    assert.equal(code, exit);
    assert.match(run.said, known);
  }
});

testWith(
  ["script"],
  "a binary body is not printed on a terminal: 23; into a pipe it is",
  async () => {
    await using server = replying(
      "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
      Uint8Array.of(1, 0, 2),
    );
    const { code, stdout } = await execute(onTerminal(command([server.url]).join(" ")));
    assert.equal(code, 23, stdout);
    assert.match(stdout, /the reply is binary and can mess up a terminal/);
    assert.match(stripped(stdout), /^reply +200 OK, 3 bytes, not printed, in /m);
    await using cut = replying("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", "a\0b");
    const part = await execute(onTerminal(command([cut.url]).join(" ")));
    assert.match(stripped(part.stdout), /^reply +200 OK, only 3 bytes, not printed, in /m);
    assert.deepEqual((await dscpGet(["-s", server.url])).bytes, Uint8Array.of(1, 0, 2));
  },
);

function stripped(text: string): string {
  return text.replace(/\p{Cc}\[\d*[A-Za-z]/gu, "");
}

testWith(
  ["root", "ip", "nft", "script"],
  "what a connect waits for is shown after a second, on a terminal only",
  async () => {
    await using namespace = await silent(8099);
    const words = command(["--connect-timeout", "1.5", "http://127.0.0.1:8099/"], namespace);
    const failed = "dscp-get: connecting to 127.0.0.1:8099 took longer than 1.5 seconds";
    const [person, program, quiet] = await Promise.all([
      execute(onTerminal(words.join(" "))),
      execute(words),
      execute(onTerminal([...words, "-s"].join(" "))),
    ]);
    assert.equal(stripped(person.stdout), `connecting to 127.0.0.1:8099 …\r\n${failed}\r\n`);
    assert.equal(program.stderr, `${failed}\n`);
    assert.equal(stripped(quiet.stdout), `${failed}\r\n`);
  },
);

testWith(["script"], "on a terminal the report begins on a line of its own", async () => {
  await using server = replying(OK);
  const { stdout } = await execute(onTerminal(command([server.url]).join(" ")));
  assert.match(stripped(stdout), /^connected .*\r\nmark .*\r\nok\r\nsent /);
  // So does an error, also without a report.
  await using cut = replying("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok");
  const long = stripped((await execute(onTerminal(command([cut.url]).join(" ")))).stdout);
  assert.match(long, /\r\nok\r\nsent .*\r\n([a-z]+ .*\r\n| +.*\r\n)+dscp-get: .*\r\n$/);
  const short = await execute(onTerminal(command(["-s", cut.url]).join(" ")));
  assert.match(short.stdout, /^ok\r\ndscp-get: /);
});

testWith(["script"], "help, report, table and errors fit 80 and 60 columns", async () => {
  await using server = replying(OK);
  const table = ["-d", "EF,DF", "-n", "2", server.url];
  const errors = [["-d", "99"], ["--tos", "185"], [`http://127.0.0.1:${closedPort()}/`]];
  for (const columns of [80, 60]) {
    for (const args of [["--help"], [server.url], table, ...errors]) {
      const shell = `stty rows 24 cols ${columns}; NO_COLOR=1 ${command(args).join(" ")}`;
      const { stdout } = await execute(onTerminal(shell));
      // Deno clears its own progress line first.
      for (const line of stripped(stdout).split(/\r?\n/)) {
        assert.ok([...line].length <= columns, line);
      }
    }
  }
});

Deno.test("a log keeps 64 KiB for a reader that waits, counts what it drops, and goes on after it", async () => {
  const output = new URL("../src/output.ts", import.meta.url);
  const script = `import { Log } from "${output}";
    const log = new Log();
    for (let at = 0; at < 2000; at++) log.add(String(at).padEnd(99, "."));
    await log.written;
    log.add("last");
    await log.written;`;
  const { code, stderr } = await execute([Deno.execPath(), "eval", script]);
  assert.equal(code, 0, stderr);
  const lines = stderr.split("\n");
  // The first line is being written; 656 of 100 bytes are the first to be more than 64 KiB.
  const kept = Array.from({ length: 657 }, (_, at) => String(at).padEnd(99, "."));
  assert.deepEqual(lines, [...kept, "… 1343 lines dropped", "last", ""]);
});
