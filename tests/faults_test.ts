import assert from "node:assert/strict";
import { attempts, Namespace, silent } from "./support/namespaces.ts";
import { Background, command, cpuTicks, dscpGet, execute, testWith } from "./support/processes.ts";
import {
  Certificates,
  ENDLESS,
  EndlessServer,
  FarEnd,
  OK,
  RawServer,
  readRequest,
  replying,
  reset,
  send,
  startNginx,
} from "./support/servers.ts";
import { until } from "./support/waiting.ts";

Deno.test("waiting ten seconds for a slow reply costs next to no CPU, in spite of the error queue", async () => {
  const wait = async (path: readonly string[]) => {
    let seconds = NaN;
    let pid = 0;
    await using server = new RawServer(async (conn) => {
      await readRequest(conn);
      const before = cpuTicks(pid);
      await new Promise((resolve) => setTimeout(resolve, 10_000)); // the wait is what is tested
      seconds = (cpuTicks(pid) - before) / 100;
      await send(conn, OK);
    });
    await using run = new Background(command([...path, server.url]));
    pid = run.child.pid;
    assert.equal((await run.end()).code, 0);
    assert.ok(seconds < 0.1, `${path}: ${seconds} s of CPU in 10 s`);
  };
  await Promise.all([wait([]), wait(["--mark-syn"])]);
});

/** A server that brings its clients to a moment to be interrupted at, and waits there. */
function upTo(moment: "request" | "head" | "body", reached: () => void): RawServer {
  return new RawServer(async (conn) => {
    await readRequest(conn);
    if (moment === "head") await send(conn, "HTTP/1.1 200 OK\r\nContent-");
    if (moment === "body") await send(conn, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhel");
    reached();
    await conn.read(new Uint8Array(1)); // until the client is gone
  });
}

testWith(["strace"], "a wrong errno, as V8 may leave one, loses no connection", async () => {
  // The first recv(2) finds nothing, and is made to give ENOENT instead of EAGAIN.
  const faulty = "strace -f -e trace=recvfrom -e inject=recvfrom:error=ENOENT:when=1".split(" ");
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    await run.until((said) => /MSG_DONTWAIT, NULL, NULL\) = -1 ENOENT .*INJECTED/.test(said));
    await send(conn, OK);
  });
  await using run = new Background(command(["--mark-syn", server.url], { under: faulty }));
  assert.equal((await run.end()).code, 0, run.said);
  assert.match(run.said, /^reply +200 OK/m);
});

Deno.test("a reply that ends is whole, also if the server then refuses the rest of the request", async () => {
  await using server = new RawServer(async (conn) => {
    await conn.read(new Uint8Array(100));
    // Its end is told by a FIN; a reset follows, as most of the request is unread.
    await send(conn, "HTTP/1.1 431 Too Large\r\n\r\ntoo large");
  });
  const large = Array.from({ length: 10 }, (_, at) => ["-H", `X-${at}: ${"x".repeat(120_000)}`]);
  for (const path of [[], ["--mark-syn"]]) {
    const { code, stdout, stderr } = await dscpGet([...path, "-s", ...large.flat(), server.url]);
    assert.deepEqual([code, stdout], [0, "too large"], `${path}: ${stderr}`);
  }
});

for (const moment of ["request", "head", "body"] as const) {
  Deno.test(`Ctrl-C after the ${moment} ends a run: 130 for a shell, and the server sees it close`, async () => {
    for (const path of [[], ["--mark-syn"], ["-n", "2"]]) {
      const reached = Promise.withResolvers<void>();
      await using server = upTo(moment, reached.resolve);
      await using run = new Background(command([...path, server.url]));
      await reached.promise;
      const { code, signal } = await run.stop("SIGINT");
      assert.deepEqual([code, signal], [130, null]);
      assert.doesNotMatch(run.said, /^ +at /m);
    }
  });
}

Deno.test("Ctrl-C ends a series whose peer always has bytes ready: 130", async () => {
  for (const path of [[], ["--mark-syn"]]) {
    await using server = new EndlessServer(...ENDLESS["chunks of one byte"]);
    await using run = new Background(command(["-n", "2", "-m", "0", ...path, server.url]));
    await until(() => server.sent >= 10_000_000, "10 MB to be sent");
    const { code } = await run.stop("SIGINT");
    assert.equal(code, 130);
    assert.ok(!server.gaveUp);
  }
});

testWith(
  ["root", "ip", "tc", "nginx", "openssl", "bash"],
  "a large request that waits for a slow link does not spin, and all of it is proved",
  async () => {
    await using certificates = await Certificates.create();
    const { folder, key, certificate } = certificates;
    await using namespace = await Namespace.create();
    await namespace.run(..."ip link set lo mtu 1500".split(" "));
    await namespace.run(
      ..."tc qdisc add dev lo root tbf rate 1mbit burst 3kb latency 10s".split(" "),
    );
    // With a small send buffer each write has to wait for room.
    await namespace.run(..."sysctl -qw net.ipv4.tcp_wmem=4096	16384	65536".split(" "));
    await using _server = await startNginx(
      folder,
      `large_client_header_buffers 16 128k; ssl_certificate ${certificate}; ssl_certificate_key ${key};
       server { listen 8080; listen 8443 ssl; return 200 "ok"; }`,
      namespace.under,
    );
    /** Runs it with a header of this size four times. @returns the seconds of CPU, and the report */
    const run = async (size: number, args: readonly string[]) => {
      const headers = [1, 2, 3, 4].flatMap((at) => ["-H", `X-${at}: ${"x".repeat(size)}`]);
      const timed = [...namespace.under, "bash", "-c", 'TIMEFORMAT="cpu %U %S"; time "$@"', "bash"];
      const { code, stderr } = await execute([...timed, ...command([...headers, ...args])]);
      assert.equal(code, 0, stderr);
      const [, user, system] = /^cpu (\S+) (\S+)$/m.exec(stderr)!;
      return { cpu: Number(user) + Number(system), stderr };
    };
    for (
      const args of [
        ["http://127.0.0.1:8080/"],
        ["--mark-syn", "http://127.0.0.1:8080/"],
        ["-k", "https://127.0.0.1:8443/"],
      ]
    ) {
      const small = await run(10, args);
      const large = await run(75_000, args);
      const seconds = large.cpu - small.cpu;
      assert.ok(seconds < 0.5, `${args}: ${seconds} s of CPU`);
      assert.match(large.stderr, /^sent +[2-4]\d\d packets with 0xB8.*: proved$/m);
    }
  },
);

testWith(
  ["root", "ip", "nft", "ss"],
  "Ctrl-C while it connects, or shakes hands for TLS, ends a run: 130",
  async () => {
    await using namespace = await silent(8099);
    for (const path of [[], ["--mark-syn"]]) {
      await using run = new Background(command([...path, "http://127.0.0.1:8099/"], namespace));
      await until(async () => (await attempts(namespace)).length > 0, "a SYN");
      const { code, signal } = await run.stop("SIGINT");
      assert.deepEqual([code, signal, run.said], [130, null, "dscp-get: interrupted\n"]);

      const hello = Promise.withResolvers<void>();
      await using server = new RawServer(async (conn) => {
        await conn.read(new Uint8Array(1));
        hello.resolve();
        while (await conn.read(new Uint8Array(4096)) !== null);
      });
      await using secure = new Background(command([...path, `https://127.0.0.1:${server.port}/`]));
      await hello.promise;
      assert.equal((await secure.stop("SIGINT")).code, 130);
    }
  },
);

Deno.test("a reset in the head or in the body is 56, marked from the SYN on or not", async () => {
  for (
    const part of [
      "",
      "HTTP/1.1 200 OK\r\nContent-",
      "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhel",
    ]
  ) {
    for (const path of [[], ["--mark-syn"]]) {
      await using server = new RawServer(async (conn) => {
        await readRequest(conn);
        await send(conn, part);
        reset(conn);
      });
      const { code, stdout, stderr } = await dscpGet([...path, server.url]);
      assert.equal(code, 56, stderr);
      assert.equal(stdout, part.endsWith("hel") ? "hel" : "");
      assert.match(stderr, /^sent +1 packet with 0xB8.*proved$/m);
      assert.match(stderr, /^dscp-get: the connection was lost: connection reset by peer$/m);
    }
  }
});

testWith(
  ["bash"],
  "with hardly a descriptor to spare a run says so: 7 or 103, no stack trace",
  async () => {
    await using server = replying(OK);
    for (const path of [[], ["--mark-syn"]]) {
      for (const limit of [19, 20, 21, 22, 23, 24, 25, 26, 32]) {
        const words = command([...path, server.url]);
        const limited = ["bash", "-c", `ulimit -n ${limit}; exec "$@"`, "bash"];
        const { code, stderr } = await execute([...limited, ...words]);
        // Below some number Deno itself cannot start.
        if (
          /panicked|failed to|Too many open files \(os error 24\)$/m.test(stderr) &&
          !/^dscp-get/m.test(stderr)
        ) continue;
        assert.ok(code === 0 || code === 7 || code === 103, `${limit}: ${code} ${stderr}`);
        assert.doesNotMatch(stderr, /^ +at /m);
        if (limit === 32) assert.equal(code, 0, stderr);
      }
    }
  },
);

testWith(["root", "ip"], "a network that is down, or has no way there, is 7", async () => {
  await using namespace = await Namespace.create();
  for (const path of [[], ["--mark-syn"]]) {
    const { code, stderr } = await dscpGet([...path, "http://192.0.2.1/"], namespace);
    assert.equal(code, 7, stderr);
    assert.match(stderr, /^dscp-get: cannot connect to 192\.0\.2\.1:80: network is unreachable$/m);
  }
  // What goes into a loopback that is down is lost without a word.
  await namespace.run("ip", "link", "set", "lo", "down");
  assert.equal(
    (await dscpGet(["--connect-timeout", "0.3", "http://127.0.0.1:1/"], namespace)).code,
    28,
  );
});

testWith(
  ["root", "ip", "sysctl"],
  "where IPv6 is off, an IPv6 address is 7, and names go by IPv4",
  async () => {
    await using namespace = await Namespace.create();
    const off = ["net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.lo.disable_ipv6=1"];
    await namespace.run("sysctl", "-q", "-w", ...off);
    await using _server = await FarEnd.start("8086", namespace.under);
    for (const path of [[], ["--mark-syn"]]) {
      assert.equal((await dscpGet([...path, "http://[::1]:8086/"], namespace)).code, 7);
      assert.equal((await dscpGet([...path, "-s", "http://localhost:8086/"], namespace)).code, 0);
    }
  },
);

testWith(
  ["root", "ip", "nft", "ss"],
  "a series that nobody answers keeps to --connect-timeout, and leaves at most one attempt behind",
  async () => {
    await using namespace = await silent(8099);
    const args = ["--json", "-n", "5", "--connect-timeout", "0.2", "http://127.0.0.1:8099/"];
    await using run = new Background(command(args, namespace));
    const reported = (count: number) => run.until((said) => said.split('"code":28').length > count);
    for (let count = 1; count < 5; count++) {
      await reported(count);
      const { length: open } = await attempts(namespace);
      assert.ok(open <= 2, `${open} attempts after ${count} requests`);
    }
    const { code } = await run.end();
    assert.equal(code, 28, run.said);
    assert.match(
      run.said,
      /dscp-get: 5 of 5 requests failed; the first: connecting to 127\.0\.0\.1:8099 took longer than 0\.2 seconds\n/,
    );
  },
);

testWith(
  ["root", "ip"],
  "an interface that goes down while it connects ends in a timeout or an error, not in a hang",
  async () => {
    await using namespace = await Namespace.create();
    await namespace.run("ip", "link", "add", "d0", "type", "veth", "peer", "name", "d1");
    await namespace.run("ip", "addr", "add", "192.0.2.2/24", "dev", "d0");
    await namespace.run("ip", "link", "set", "d0", "up");
    await namespace.run("ip", "link", "set", "d1", "up");
    for (const path of [[], ["--mark-syn"]]) {
      await namespace.run("ip", "link", "set", "d0", "up");
      await using run = new Background(
        command([...path, "--connect-timeout", "2", "http://192.0.2.9/"], namespace),
      );
      // Its SYN waits for a neighbour that is not there.
      const neighbour = () => namespace.run("ip", "neigh", "show", "192.0.2.9");
      const isAskedFor = async () => (await neighbour()).stdout.includes("INCOMPLETE");
      await until(async () => run.hasEnded || await isAskedFor(), "a SYN that waits for ARP");
      await namespace.run("ip", "link", "set", "d0", "down");
      const { code } = await run.end();
      assert.ok(code === 28 || code === 7, `${code} ${run.said}`);
    }
  },
);

Deno.test("a server that accepts and closes at once is 52 or 56", async () => {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const closing = (async () => {
    for await (const conn of listener) conn.close();
  })();
  for (const path of [[], ["--mark-syn"]]) {
    const { code } = await dscpGet([...path, `http://127.0.0.1:${listener.addr.port}/`]);
    assert.ok(code === 52 || code === 56, String(code));
  }
  listener.close();
  await closing;
});

testWith(
  ["bash"],
  "a reader of standard output that goes away in the middle of a body ends the run: 23",
  async () => {
    const piece = new Uint8Array(1 << 20);
    await using server = new RawServer(async (conn) => {
      await readRequest(conn);
      await send(conn, `HTTP/1.1 200 OK\r\nContent-Length: ${64 << 20}\r\n\r\n`);
      for (let at = 0; at < 64; at++) await send(conn, piece);
    });
    const words = command([server.url]).map((word) => `'${word}'`).join(" ");
    const { stdout, stderr } = await execute([
      "bash",
      "-c",
      `exec 3>&1; (${words}; echo $? >&3) | head -c 3000000 >/dev/null`,
    ]);
    assert.equal(stdout, "23\n");
    // What is known is told all the same, but not that head has gone.
    assert.match(stderr, /^connected [^]*^sent .*: proved\nreply +200 OK, only \d+ bytes [^]*/m);
    assert.ok(!stderr.includes("dscp-get:"), stderr);
  },
);
