import assert from "node:assert/strict";
import { Exit } from "../main.ts";
import { Namespace, silent } from "./support/namespaces.ts";
import {
  Background,
  command,
  dscpGet,
  execute,
  inject,
  onTerminal,
  testWith,
} from "./support/processes.ts";
import {
  closedPort,
  OK,
  RawServer,
  readRequest,
  replying,
  send,
  startPython,
} from "./support/servers.ts";

testWith(
  ["root", "ip"],
  "with nobody on the default port it answers itself, proves, and says so",
  async () => {
    await using namespace = await Namespace.create();
    const { code, stdout, stderr } = await dscpGet([], namespace);
    assert.equal(code, 0, stderr);
    assert.match(stdout, /dscp-get's built-in server/);
    const lines = stderr.trimEnd().split("\n");
    assert.match(
      lines[0],
      /^connected {2}127\.0\.0\.1:\d+ → 127\.0\.0\.1:8086, the built-in server; descriptor \d+$/,
    );
    assert.match(lines[1], /^mark {7}EF = DSCP 46 = byte 0xB8; the kernel reads back 0xB8$/);
    assert.match(lines[2], /^left {7}1 packet with 0xB8, read from the IP header: proved$/);
    assert.match(
      lines[3],
      /^arrived {4}SYN 0x00, ACK 0x00, told by the server: only the unmarked handshake/,
    );
    assert.match(lines[4], /^reply {6}200 OK, \d+ bytes in \d+\.\d ms$/);
    assert.match(lines[5], /^handshake {2}unmarked/);
    assert.equal(lines.length, 6);
  },
);

testWith(["root", "ip", "python3"], "whoever has the default port is asked", async () => {
  await using namespace = await Namespace.create();
  await using _server = await startPython(["8086"], namespace.under);
  const { code, stdout } = await dscpGet(["--json"], namespace);
  assert.equal(code, 0);
  const result = JSON.parse(stdout);
  assert.equal(result.server, "remote");
  assert.match(result.reply.headers.find(([name]: [string]) => name === "server")[1], /SimpleHTTP/);
});

testWith(
  ["root", "ip"],
  "twenty runs started at once all succeed, also where only that one port is allowed",
  async () => {
    await using namespace = await Namespace.create();
    for (const flags of [undefined, ["--allow-net=127.0.0.1:8086", "--allow-ffi"]]) {
      const runs = await Promise.all(
        Array.from({ length: 20 }, () => dscpGet([], { under: namespace.under, flags })),
      );
      assert.deepEqual(runs.map(({ code, stderr }) => code === 0 ? 0 : stderr), runs.map(() => 0));
      for (const { stdout } of runs) assert.match(stdout, /built-in server/);
    }
  },
);

testWith(
  ["root", "ip"],
  "a server on the default port that vanishes before it replies is replaced by our own",
  async () => {
    await using namespace = await Namespace.create();
    const closer =
      `const l = Deno.listen({ hostname: "127.0.0.1", port: 8086 }); console.log("ready");
    const c = await l.accept(); await c.read(new Uint8Array(9)); c.close(); l.close();`;
    await using server = new Background([...namespace.under, Deno.execPath(), "eval", closer]);
    await server.until((said) => said.includes("ready"));
    const { code, stdout, stderr } = await dscpGet([], namespace);
    assert.equal(code, 0, stderr);
    assert.match(stdout, /built-in server/);
    assert.match(stderr, /127\.0\.0\.1:(?!8086)\d+, the built-in server/);
  },
);

Deno.test("with a URL there is no built-in server: refused is 7, with the hint how to start one", async () => {
  for (const host of ["127.0.0.1", "[::1]", "localhost"]) {
    const port = closedPort();
    const { code, stderr } = await dscpGet([`http://${host}:${port}/`]);
    assert.equal(code, Exit.cannotConnect);
    assert.match(
      stderr,
      new RegExp(
        `^dscp-get: cannot connect to .*:${port}: connection refused\nhint: .*http\\.server ${port}\n$`,
      ),
    );
  }
});

Deno.test("a host that does not exist is 6, also when a family is asked for", async () => {
  for (const args of [[], ["-4"], ["-6"]]) {
    const { code, stderr } = await dscpGet([...args, "http://does-not-exist.invalid/"]);
    assert.equal(code, Exit.hostNotFound, stderr);
    assert.match(stderr, /'does-not-exist\.invalid'/);
  }
  assert.equal((await dscpGet(["-6", "http://127.0.0.1/"])).code, Exit.hostNotFound);
  assert.equal((await dscpGet(["-4", "http://[::1]/"])).code, Exit.hostNotFound);
});

Deno.test("-4 resolves names by the system's own resolver", async () => {
  await using server = replying(OK);
  const { code, stdout } = await dscpGet(["-4", "--json", `http://localhost:${server.port}/`]);
  assert.equal(code, 0);
  assert.equal(JSON.parse(stdout).remote.address, "127.0.0.1");
});

Deno.test("-m bounds the whole request: 28, and what left before is told", async () => {
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    await conn.read(new Uint8Array(1));
  });
  const { code, stdout, stderr } = await dscpGet(["-m", "0.3", "--json", server.url]);
  assert.equal(code, Exit.timeout);
  assert.equal(stderr, "dscp-get: the request took longer than 0.3 seconds\n");
  const result = JSON.parse(stdout);
  assert.deepEqual([result.error.code, result.left.proved, result.reply], [28, true, null]);
});

testWith(["root", "ip", "nft"], "--connect-timeout bounds the connecting: 28", async () => {
  await using namespace = await silent(8099);
  for (
    const args of [["--connect-timeout", "0.3"], ["-m", "0.3"], ["-4", "--connect-timeout", ".3"]]
  ) {
    const { code, stderr } = await dscpGet([...args, "http://127.0.0.1:8099/"], namespace);
    assert.equal(code, Exit.timeout, stderr);
    assert.match(stderr, /^dscp-get: (connecting|the request) took longer than 0\.3 seconds\n$/);
  }
});

Deno.test("0 is no limit to the time", async () => {
  await using server = replying(OK);
  assert.equal(
    (await dscpGet(["-s", "-m", "0", "--connect-timeout", "0", server.url])).stdout,
    "ok",
  );
});

testWith(
  ["root", "ip", "nft", "sysctl"],
  "a connect that the kernel gives up is 28 as well",
  async () => {
    await using namespace = await silent(8099);
    await namespace.run("sysctl", "-q", "-w", "net.ipv4.tcp_syn_retries=1");
    const run = (...how: string[]) =>
      dscpGet([...how, "--connect-timeout", "0", "http://127.0.0.1:8099/"], namespace);
    for (const { code, stderr } of await Promise.all([run(), run("--mark-syn")])) {
      assert.deepEqual([code, stderr], [28, "dscp-get: no answer from 127.0.0.1:8099\n"]);
    }
  },
);

Deno.test("a server that drips is read to its end within the time, and given up after it", async () => {
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    for (const byte of OK) {
      await send(conn, byte);
      await new Promise((resolve) => setImmediate(resolve));
    }
  });
  assert.equal((await dscpGet([server.url])).stdout, "ok");
});

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
  const { local, milliseconds, left, ...rest } = JSON.parse(stdout);
  assert.deepEqual(rest, {
    url: `${server.url}x?y`,
    server: "remote",
    remote: { address: "127.0.0.1", port: server.port },
    mark: { name: "AF41", dscp: 34, tos: 136, readBack: 136, handshake: false },
    arrived: null,
    reply: {
      status: 200,
      reason: "OK",
      headers: [["content-length", "10"]],
      bodyBytes: 10,
      complete: true,
    },
  });
  assert.equal(local.address, "127.0.0.1");
  assert.equal(left.proved, true);
  const { connect, firstByte, total } = milliseconds;
  assert.ok(0 < connect && connect <= firstByte && firstByte <= total);
});

Deno.test("standard output that is closed is 23, without a word", async () => {
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
    assert.deepEqual(
      [stdout, stderr],
      args[0] === "--help" && stdout === "0\n" ? ["0\n", ""] : ["23\n", ""],
    );
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

testWith(["script"], "colour only on a terminal and without NO_COLOR", async () => {
  await using server = replying(OK);
  const words = command(["-d", "cs1", server.url]).join(" ");
  const onOne = onTerminal(words);
  assert.ok((await execute(["env", "-u", "NO_COLOR", ...onOne])).stdout.includes("\x1b[1mmark"));
  assert.ok(
    !(await execute(["env", "NO_COLOR=1", ...onOne])).stdout.includes("\x1b["),
  );
  assert.ok(!(await dscpGet([server.url])).stderr.includes("\x1b["));
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

Deno.test("a missing permission is 103 and names the flag", async () => {
  await using server = replying(OK);
  const where = `127.0.0.1:${server.port}`;
  for (
    const [flags, hint] of [
      [[], `run with --allow-net or --allow-net=${where}`],
      [["--allow-ffi"], `run with --allow-net or --allow-net=${where}`],
      [["--allow-net"], "run with --allow-ffi"],
      [["--allow-net", "--allow-ffi=libc.so.6"], "run with --allow-ffi, without a file name"],
      [["--allow-net=127.0.0.2", "--allow-ffi"], `run with --allow-net or --allow-net=${where}`],
    ] as const
  ) {
    const { code, stdout, stderr } = await dscpGet([server.url], { flags });
    assert.equal(code, Exit.cannotRun, stderr);
    assert.deepEqual([stdout, stderr.split("\n").slice(1)], ["", [`hint: ${hint}`, ""]]);
  }
  const enough = { flags: [`--allow-net=${where}`, "--allow-ffi"] };
  assert.equal((await dscpGet([server.url], enough)).code, 0);
});

testWith(
  ["script"],
  "on a terminal a missing permission fails as well, instead of asking",
  async () => {
    for (
      const [flags, args, error] of [
        [
          ["--allow-net"],
          ["http://127.0.0.1:1/"],
          /no permission to call libc[^]*hint: run with --allow-ffi/,
        ],
        [
          ["--allow-ffi"],
          ["http://127.0.0.1:1/"],
          /no permission to use 127\.0\.0\.1:1[^]*hint: run with --allow-net/,
        ],
        [
          ["--allow-ffi"],
          ["--mark-syn"],
          /no permission to use 127\.0\.0\.1:8086[^]*hint: run with --allow-net/,
        ],
        [
          ["--allow-ffi"],
          ["--serve", "0"],
          /no permission to use 127\.0\.0\.1:0[^]*hint: run with --allow-net/,
        ],
        [
          ["--allow-net", "--allow-ffi"],
          ["--cacert", "/etc/hostname", "https://127.0.0.1:1/"],
          /no permission to read '\/etc\/hostname'[^]*hint: run with --allow-read/,
        ],
      ] as const
    ) {
      const words = command(args, { flags }).filter((word) => word !== "--no-prompt").join(" ");
      const { code, stdout } = await execute(onTerminal(words));
      assert.equal(code, Exit.cannotRun, stdout);
      assert.match(stdout, error);
      assert.equal(stdout.match(/dscp-get: /g)!.length, 1);
    }
  },
);

testWith(
  ["strace"],
  "a mark that the kernel does not take is 100 and names the call and errno",
  async () => {
    await using server = replying(OK);
    const { code, stderr } = await inject(
      "setsockopt",
      "IP_TOS",
      (n) => `error=EPERM:when=${n}+`,
      [server.url],
    );
    assert.equal(code, Exit.notMarked, stderr);
    assert.match(
      stderr,
      /^dscp-get: the kernel did not take the mark: setsockopt\(IP_TOS\): Operation not permitted \(errno 1\)$/m,
    );
  },
);

testWith(["strace"], "a mark that reads back as another is 100 and names both", async () => {
  await using server = replying(OK);
  const { code, stderr } = await inject(
    "getsockopt",
    "IP_TOS",
    (n) => `poke_exit=@arg4=20000000:when=${n}`,
    [server.url],
  );
  assert.equal(code, Exit.notMarked, stderr);
  assert.match(
    stderr,
    /setsockopt\(IP_TOS, 0xB8\) was taken, but getsockopt\(IP_TOS\) reads back 0x20 \(errno 0\)$/m,
  );
});
