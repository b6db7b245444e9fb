import assert from "node:assert/strict";
import { connectToFirst } from "../ffi/dial.ts";
import { LibcError } from "../ffi/calls.ts";
import { MarkError } from "../ffi/mod.ts";
import { pause } from "../ffi/deno.ts";
import { Exit, Failure } from "../main.ts";
import { parseTarget } from "../src/target.ts";
import { attempts, Namespace, TwinLinks } from "./support/namespaces.ts";
import { Background, command, dscpGet, execute, testWith } from "./support/processes.ts";
import {
  Certificates,
  closedPort,
  FarEnd,
  OK,
  replying,
  replyingOn,
  startNginx,
} from "./support/servers.ts";
import { until } from "./support/waiting.ts";

Deno.test("with a URL there is no built-in server: refused is 7, with the hint how to start one", async () => {
  for (const host of ["127.0.0.1", "[::1]", "localhost"]) {
    const port = closedPort();
    const { code, stderr } = await dscpGet([`http://${host}:${port}/`]);
    assert.equal(code, Exit.cannotConnect);
    const hint = host === "[::1]"
      ? `.* --serve '\\[::1\\]:${port}', or python3 -m http\\.server -b ::1`
      : `.* --serve ${port}, or python3 -m http\\.server`;
    assert.match(
      stderr,
      new RegExp(
        `^dscp-get: cannot connect to .*:${port}: connection refused\nhint: ${hint} ${port}\n$`,
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
});

testWith(["curl"], "an address of the family that is not asked for is 7, as curl's", async () => {
  for (const args of [["-6", "http://127.0.0.1/"], ["-4", "http://[::1]/"]]) {
    assert.equal((await execute(["curl", "-s", ...args])).code, Exit.cannotConnect);
    for (const how of [[], ["--mark-syn"], ["-k"]]) {
      const { code, stderr } = await dscpGet([...how, ...args]);
      assert.equal(code, Exit.cannotConnect, stderr);
      assert.match(stderr, /^dscp-get: host '.*' has no IPv[46] address$/m);
    }
  }
});

for (const [family, address] of [["-4", "127.0.0.1"], ["-6", "::1"]]) {
  Deno.test(`names below localhost are this host, whatever the resolver knows: ${family}`, async () => {
    await using server = replyingOn(address, OK);
    for (const name of ["a.localhost", "A.B.localhost"]) {
      for (const how of [[], ["--mark-syn"], [family], [family, "--mark-syn"]]) {
        const url = `http://${name}:${server.port}/`;
        const { code, stdout, stderr } = await dscpGet(["--json", ...how, url]);
        assert.equal(code, 0, stderr);
        assert.equal(JSON.parse(stdout).remote.address, address);
        assert.match(server.requests.at(-1)!, new RegExp(`^Host: ${name}:`, "mi"));
      }
    }
  });
}

Deno.test("-4 resolves names by the system's own resolver", async () => {
  await using server = replying(OK);
  const { code, stdout } = await dscpGet(["-4", "--json", `http://localhost:${server.port}/`]);
  assert.equal(code, 0);
  assert.equal(JSON.parse(stdout).remote.address, "127.0.0.1");
});

testWith(
  ["root", "ip", "curl", "python3"],
  "the zone of a link-local address names the link, and stays out of the Host header, as curl's does",
  async () => {
    await using links = await TwinLinks.create();
    const echoHost = `import http.server, socket
class Server(http.server.HTTPServer):
    address_family = socket.AF_INET6
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.headers["Host"].encode())
server = Server(("fe80::1", 8080, 0, socket.if_nametoindex("s1")), Handler)
print("listening", flush=True)
server.serve_forever()`;
    await using server = new Background([...links.server.under, "python3", "-c", echoHost]);
    await server.until((said) => said.includes("listening"));
    for (const zone of ["%c1", "%25c1"]) {
      const url = `http://[fe80::1${zone}]:8080/`;
      const curl = await execute([...links.client.under, "curl", "-sg", url]);
      assert.deepEqual([curl.code, curl.stdout], [0, "[fe80::1]:8080"]);
      for (const args of [[], ["--mark-syn"], ["-6"]]) {
        const { code, stdout, stderr } = await dscpGet([...args, url], links.client);
        assert.deepEqual([code, stdout], [curl.code, curl.stdout], stderr);
        const { sent, ...rest } = JSON.parse(
          (await dscpGet(["--json", ...args, url], links.client)).stdout,
        );
        assert.deepEqual([rest.url, sent.proved], ["http://[fe80::1]:8080/", true]);
        const elsewhere = url.replace("c1", "c0");
        assert.equal((await dscpGet([...args, elsewhere], links.client)).code, Exit.cannotConnect);
        const nowhere = url.replace("c1", "c2");
        assert.equal((await dscpGet([...args, nowhere], links.client)).code, Exit.cannotConnect);
      }
    }
  },
);

testWith(
  ["root", "ip"],
  "--serve listens on a link-local address of the link in its zone",
  async () => {
    await using links = await TwinLinks.create();
    for (const zone of ["%s1", "%25s1"]) {
      await using _server = await FarEnd.start(`[fe80::1${zone}]:8080`, links.server.under);
      const ask = (device: string) =>
        dscpGet(["--json", "--mark-syn", `http://[fe80::1%${device}]:8080/`], links.client);
      const { code, stdout } = await ask("c1");
      const { syn, ack, data } = JSON.parse(stdout).arrived;
      assert.deepEqual([code, syn, ack, data], [0, 0xb8, null, 0xb8]);
      assert.equal((await ask("c0")).code, Exit.cannotConnect);
    }
  },
);

Deno.test("--allow-net of a link-local address holds for it with a zone too", async () => {
  for (const args of [[], ["--mark-syn"]]) {
    const run = (allowed: string) =>
      dscpGet([...args, "http://[fe80::1%25lo]:8080/"], {
        flags: ["--allow-ffi", `--allow-net=${allowed}`],
      });
    assert.equal((await run("[fe80::1]:8080")).code, Exit.cannotConnect);
    assert.equal((await run("[fe80::2]:8080")).code, Exit.cannotRun);
  }
});

Deno.test("a zone is read as curl reads it: after % or %25, as a name or a number", () => {
  for (
    const [authority, host] of [
      ["[fe80::1%eth0]", "fe80::1%eth0"],
      ["[fe80::1%25eth0]:81", "fe80::1%eth0"],
      ["[FE80:0::1%wl-p3.5]", "fe80::1%wl-p3.5"],
      ["[fe80::1%2]", "fe80::1%2"],
      ["[fe80::1%25]", "fe80::1%25"],
    ]
  ) {
    const target = parseTarget(`http://${authority}/a%20b?c#d`);
    assert.deepEqual([target.host, target.path], [host, "/a%20b?c"], authority);
  }
  const bad = "[fe80::1%]|[fe80::1%a b]|[fe80::1%eth0|[fe80::1%16-characters-or]|[fe80::1%\u202e]";
  for (const authority of `${bad}|127.0.0.1%lo|[x%eth0]`.split("|")) {
    assert.throws(
      () => parseTarget(`http://${authority}/`),
      (error) => error instanceof Failure && error.code === Exit.badUrl,
      authority,
    );
  }
});

/** A namespace whose server has an address that works and two that drop all packets. */
async function halfDead(): Promise<Namespace> {
  const namespace = await Namespace.create(`192.0.2.1 server.example
2001:db8::9 server.example
192.0.2.9 two.example
192.0.2.1 two.example
192.0.2.1 owt.example
192.0.2.9 owt.example
`);
  for (const address of ["192.0.2.1/32", "192.0.2.9/32", "2001:db8::9/128"]) {
    await namespace.run("ip", "addr", "add", address, "dev", "lo");
  }
  const chain = "add chain inet t in { type filter hook input priority 0; }";
  const drop = (what: string) => `add rule inet t in ${what} tcp dport 8080-8443 drop`;
  const drops = [drop("ip daddr 192.0.2.9"), drop("ip6 daddr 2001:db8::9")].join("; ");
  await namespace.run("nft", `add table inet t; ${chain}; ${drops}`);
  return namespace;
}

testWith(
  ["root", "ip", "nft", "nginx", "openssl"],
  "an address that gives no answer leaves time for the next one, however it is connected",
  async () => {
    await using certificates = await Certificates.create();
    const { folder, key, certificate, root } = certificates;
    await using namespace = await halfDead();
    await using _server = await startNginx(
      folder,
      `ssl_certificate ${certificate}; ssl_certificate_key ${key};
       server { listen 192.0.2.1:8080; listen 192.0.2.1:8443 ssl; return 200 "ok"; }`,
      namespace.under,
    );
    const flags = ["--allow-net", "--allow-ffi", "--allow-read"];
    const http = "http://server.example:8080/", https = "https://server.example:8443/";
    for (
      const args of [
        [http],
        ["--mark-syn", http],
        ["-k", https],
        ["--cacert", root, https],
        // The resolver may change the order.
        ...["http://two.example:8080/", "http://owt.example:8080/"].flatMap((url) => [
          ["-4", url],
          ["-4", "--mark-syn", url],
        ]),
      ]
    ) {
      const { under } = namespace;
      const run = await dscpGet(["--connect-timeout", "5", ...args], { under, flags });
      assert.deepEqual([run.code, run.stdout], [0, "ok"], `${args}: ${run.stderr}`);
      assert.match(run.stderr, /^sent .*: proved$/m);
    }
  },
);

testWith(
  ["root", "ip", "nft", "nc", "ss"],
  "the attempts that lose to another address are given up",
  async () => {
    await using namespace = await halfDead();
    // It accepts, and says nothing.
    await using _server = new Background([
      ...namespace.under,
      ..."nc -lkn 192.0.2.1 8080".split(" "),
    ]);
    const listening = async () => (await namespace.run("ss", "-Hltn")).stdout;
    await until(async () => (await listening()).includes(":8080"), "nc to listen");
    const connected = async () => {
      const { stdout } = await namespace.run(..."ss -Htn state established".split(" "));
      return stdout.includes(":8080");
    };
    for (
      const args of [
        ["--mark-syn", "http://server.example:8080/"],
        ["-4", "http://two.example:8080/"],
        ["-4", "http://owt.example:8080/"],
      ]
    ) {
      await using run = new Background(command([...args], namespace));
      await until(async () => run.hasEnded || await connected(), "a connection");
      const waiting = () => attempts(namespace);
      await until(async () => run.hasEnded || (await waiting()).length === 0, "the others to end");
      assert.ok(await connected(), run.said);
    }
  },
);

/** A connection, and whether it was closed. */
class Fake {
  isClosed = false;
  constructor(readonly address: string) {}
  close(): void {
    this.isClosed = true;
  }
}

Deno.test("of several addresses the first to connect wins, and a later one is closed", async () => {
  const late = Promise.withResolvers<Fake>();
  const signals: AbortSignal[] = [];
  const winner = await connectToFirst(["a", "b", "c"], (address, signal) => {
    signals.push(signal);
    return address === "a" ? late.promise : Promise.resolve(new Fake(address));
  });
  assert.deepEqual([winner.address, winner.isClosed], ["b", false]);
  assert.deepEqual(signals.map(({ aborted }) => aborted), [true, true]);
  const loser = new Fake("a");
  late.resolve(loser);
  await late.promise;
  await Promise.resolve();
  await Promise.resolve();
  assert.ok(loser.isClosed);
});

Deno.test("an address that fails does not wait for the next one's turn; the last failure is reported", async () => {
  const tried: string[] = [];
  const failing = (address: string) => {
    tried.push(address);
    return Promise.reject(new Error(address));
  };
  await assert.rejects(connectToFirst(["a", "b", "c"], failing), /^Error: c$/);
  assert.deepEqual(tried, ["a", "b", "c"]);
});

Deno.test("a signal gives up all attempts", async () => {
  const abort = new AbortController();
  const connecting = connectToFirst(["a", "b"], (_, signal) => {
    setTimeout(() => abort.abort(new Error("no")), 0);
    return new Promise<Fake>((_, reject) => signal.onabort = () => reject(signal.reason));
  }, abort.signal);
  await assert.rejects(connecting, /^Error: no$/);
});

Deno.test("the next address has its turn within the bounds of RFC 8305: 100 ms to 2 s", async () => {
  const order: string[] = [];
  const note = async (milliseconds: number) => {
    await pause(milliseconds);
    order.push(String(milliseconds));
  };
  // Timers of one process end in the order in which they are due, however busy it is.
  const late = note(2000), early = note(100);
  const winner = await connectToFirst(["a", "b"], (address) => {
    order.push(address);
    return address === "a" ? new Promise<Fake>(() => {}) : Promise.resolve(new Fake(address));
  });
  assert.equal(winner.address, "b");
  await Promise.all([early, late]);
  assert.deepEqual(order, ["a", "100", "b", "2000"]);
});

Deno.test("a failure that every address would have ends the attempts", async () => {
  for (const error of [new LibcError("setsockopt(IP_TOS)", 1), new MarkError("IP_TOS", 0xb8, 0)]) {
    const tried: string[] = [];
    const connecting = connectToFirst(["a", "b"], (address) => {
      tried.push(address);
      return Promise.reject(error);
    });
    await assert.rejects(connecting, error);
    assert.deepEqual(tried, ["a"]);
  }
});
