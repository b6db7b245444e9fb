import assert from "node:assert/strict";
import { icmpMeaning, parseIcmpError, parseQuote } from "../ffi/icmp.ts";
import { encode } from "../ffi/sockaddr.ts";
import type { Hop } from "../ffi/mod.ts";
import { trace } from "../main.ts";
import { DEFAULTS } from "../src/options.ts";
import { traceOptionsOf } from "../src/trace.ts";
import { Chain, CHAIN_SERVER, Namespace, rewrite } from "./support/namespaces.ts";
import { Capture, fromHex } from "./support/packets.ts";
import {
  Background,
  command,
  dscpGet,
  execute,
  Nobody,
  onTerminal,
  openDescriptors,
  testWith,
} from "./support/processes.ts";
import { Random, SEED } from "./support/random.ts";
import {
  Certificates,
  closedPort,
  FarEnd,
  OK,
  RawServer,
  readRequest,
  replying,
  startPython,
} from "./support/servers.ts";

const NEEDS = ["root", "ip", "nft", "sysctl"];
const URLS = {
  IPv4: `http://${CHAIN_SERVER.ipv4}:8086/`,
  IPv6: `http://[${CHAIN_SERVER.ipv6}]:8086/`,
};
const EF = 0xb8, CS1 = 0x20;

/** What is used of a line of JSON. */
interface Line {
  readonly path: readonly Hop[];
  readonly changed: unknown;
  readonly arrived: { readonly syn: number | null } | null;
  readonly error?: { readonly code: number; readonly message: string };
}

const jsonOf = (stdout: string): Line => JSON.parse(stdout);
const marksOf = ({ path }: Line) => path.map(({ tos }) => tos);

/** Adds a rule of its own table to a host. */
async function filter(host: Namespace, hook: string, rule: string): Promise<void> {
  await host.script(
    "nft add table inet f",
    `nft 'add chain inet f ${hook} { type filter hook ${hook} priority 10; }'`,
    `nft add rule inet f ${hook} ${rule}`,
  );
}

/** A chain with a far end on port 8086, for several scenes one after the other. */
async function stage(play: (chain: Chain, clear: () => Promise<void>) => Promise<void>) {
  await using chain = await Chain.create();
  await using _server = await FarEnd.start("[::]:8086", chain.server.under);
  await play(chain, async () => {
    for (const host of [...chain.routers, chain.server]) await host.run("nft", "flush", "ruleset");
  });
}

/** Rewrites of EF, and what each hop and the server then receive. */
const SCENES: {
  name: string;
  /** Router, hook, and the DSCP before and behind. */
  rules: readonly (readonly [router: number, hook: string, from: string, to: string])[];
  marks: readonly number[];
  changed: { after: number; at: number; from: number; to: number } | null;
}[] = [
  { name: "no rewrite", rules: [], marks: [EF, EF, EF, EF], changed: null },
  {
    name: "r1's forward hook",
    rules: [[1, "forward", "ef", "cs1"]],
    marks: [EF, CS1, CS1, CS1],
    changed: { after: 1, at: 2, from: EF, to: CS1 },
  },
  {
    name: "r2's prerouting hook",
    rules: [[2, "prerouting", "ef", "cs1"]],
    marks: [EF, CS1, CS1, CS1],
    changed: { after: 1, at: 2, from: EF, to: CS1 },
  },
  {
    name: "r3's postrouting hook, which only the server sees",
    rules: [[3, "postrouting", "ef", "cs1"]],
    marks: [EF, EF, EF, CS1],
    changed: { after: 3, at: 4, from: EF, to: CS1 },
  },
  {
    name: "a bleached precedence",
    rules: [[1, "forward", "ef", "6"]],
    marks: [EF, 0x18, 0x18, 0x18],
    changed: { after: 1, at: 2, from: EF, to: 0x18 },
  },
  {
    name: "two rewrites",
    rules: [[1, "forward", "ef", "af41"], [2, "forward", "af41", "cs0"]],
    marks: [EF, 0x88, 0, 0],
    changed: { after: 1, at: 2, from: EF, to: 0x88 },
  },
];

testWith(
  [...NEEDS, "tcpdump", "setpriv"],
  "each hop is given the mark that tcpdump sees there: root on IPv4 and IPv6, nobody on IPv6",
  async () => {
    await using nobody = await Nobody.create();
    await stage(async ({ client, routers }, clear) => {
      for (const { name, rules, marks, changed } of SCENES) {
        await clear();
        for (const [router, ...rule] of rules) await rewrite(routers[router - 1], ...rule);
        for (
          const [words, url] of [
            [command([], client), URLS.IPv4],
            [command([], client), URLS.IPv6],
            [[...client.under, ...nobody.command], URLS.IPv6],
          ] as const
        ) {
          await using captures = new AsyncDisposableStack();
          const seen: Capture[] = [];
          for (const { under } of routers) {
            seen.push(captures.use(await Capture.start(8086, "near", under)));
          }
          const { code, stdout, stderr } = await execute([...words, "--trace", "--json", url]);
          const line = jsonOf(stdout);
          assert.deepEqual([marksOf(line), line.changed], [marks, changed], `${name}: ${stderr}`);
          assert.equal(code, changed === null ? 0 : 102, name);
          assert.deepEqual(line.path.map(({ hop }) => hop), [1, 2, 3, 4]);
          const evidence = line.path.map(({ evidence }) => evidence);
          assert.deepEqual(evidence, ["quote", "quote", "quote", "server"]);
          for (const [at, capture] of seen.entries()) {
            const isSyn = ({ flags }: { flags: string }) => flags === "S";
            const passing = 4 - at;
            const packets = await capture.until((all) => all.filter(isSyn).length >= passing);
            const received = new Set(packets.filter(isSyn).map(({ tos }) => tos));
            // tcpdump sees packets before the prerouting hook, which the quote comes after.
            const before = at === 1 && rules[0]?.[1] === "prerouting" ? EF : marks[at];
            assert.deepEqual([...received], [before], `${name}, hop ${at + 1}`);
          }
        }
      }
    });
  },
);

testWith(
  [...NEEDS, "setpriv"],
  "on IPv4 without privilege it says at most that the lower bits were kept, and gives one hint",
  async () => {
    await using nobody = await Nobody.create();
    await stage(async ({ client, routers }, clear) => {
      const run = (...args: string[]) =>
        execute([...client.under, ...nobody.command, "--trace", ...args, URLS.IPv4]);
      for (const { name, rules, marks } of SCENES) {
        await clear();
        for (const [router, ...rule] of rules) await rewrite(routers[router - 1], ...rule);
        const { path } = jsonOf((await run("--json")).stdout);
        const isKept = marks.map((tos) => (tos & 0x1c) === (EF & 0x1c));
        for (const [at, { tos, icmpTos, evidence }] of path.slice(0, 3).entries()) {
          assert.equal(tos, null, name);
          assert.equal(icmpTos, marks[at] & 0x1e | 0xc0, name);
          assert.equal(evidence, isKept[at] ? "icmp" : null, name);
        }
      }
      await clear();
      await rewrite(routers[0], "forward", "ef", "6");
      const kept = await run();
      assert.match(kept.stdout, /^ {2}2 {2}10\.78\.2\.2 +[\d.]+ {2}lower bits kept$/m);
      assert.doesNotMatch(kept.stdout.split("\n").slice(0, 4).join("\n"), /changed|0xB8/);
      assert.match(kept.stderr, /^hint: [^]*setcap\s+cap_net_raw\+ep/m);
      assert.equal(kept.stderr.match(/hint: to see the whole mark/g)!.length, 1);
      assert.equal(kept.code, 102, "the server reports the change");
      const unknown = await run("-d", "CS1");
      assert.match(unknown.stdout, /^ {2}1 {2}10\.78\.1\.2 +[\d.]+ {2}unknown$/m);
      assert.doesNotMatch((await run("-s")).stderr, /hint: to see/);
    });
  },
);

testWith(NEEDS, "a table, its verdict last, and the report of the request behind it", async () => {
  await stage(async ({ client, routers }) => {
    await rewrite(routers[0], "forward", "ef", "cs1");
    await filter(routers[2], "output", "icmp type time-exceeded drop");
    const { code, stdout, stderr } = await dscpGet(["--trace", URLS.IPv4], client);
    assert.equal(code, 102);
    assert.equal(
      stdout.replace(/ +[\d.]+ {2}(?=[A-Zc])/g, "  N  "),
      `hop  address             ms  mark there
  1  10.78.1.2  N  EF (0xB8)
  2  10.78.2.2  N  CS1 (0x20)   changed
  3  (no answer)
  4  10.78.4.2  N  connected; server reports SYN CS1 (0x20)
EF (0xB8) was changed to CS1 (0x20) between hop 1 (10.78.1.2) and hop 2
(10.78.2.2), as by Re-mark-DSCP (RFC 9435, 4.3). No answer within 5 s from hop
3.
`,
    );
    assert.match(stderr, /^connected .*\nmark .*\nsent .*proved\narrived .*\nreply .*200 OK/);
    assert.doesNotMatch(stderr, /hint/);
    const error = "the path changed EF (0xB8) to CS1 (0x20) between hop 1 and hop 2";
    assert.match(stderr, new RegExp(`^dscp-get: ${error.replace(/[()]/g, "\\$&")}$`, "m"));
    const terminal = await execute([
      ...client.under,
      ...onTerminal(command(["--trace", "-s", URLS.IPv6]).join(" ")),
    ]);
    for (const line of terminal.stdout.split("\r\n")) assert.ok(line.length <= 80, line);
    assert.match(terminal.stdout, /^ {2}2 {2}2001:db8:2::2 +[\d.]+ {2}CS1 \(0x20\) {3}changed/m);
  });
});

testWith(NEEDS, "a silent router is named between the two that show a change", async () => {
  await stage(async ({ client, routers }) => {
    await rewrite(routers[0], "forward", "ef", "cs1");
    const silence = "meta l4proto { icmp, ipv6-icmp } ct state related drop";
    await filter(routers[1], "output", `${silence.replace(" ct state related", "")}`);
    const { stdout } = await dscpGet(["--trace", "--json", URLS.IPv4], client);
    const line = jsonOf(stdout);
    assert.deepEqual(marksOf(line), [EF, null, CS1, CS1]);
    assert.deepEqual(line.changed, { after: 1, at: 3, from: EF, to: CS1 });
    assert.deepEqual(line.path[1], {
      hop: 2,
      address: null,
      milliseconds: null,
      tos: null,
      icmpTos: null,
      evidence: null,
      answer: null,
      waited: 5000,
    });
    const text = (await dscpGet(["--trace", "-s", URLS.IPv4], client)).stdout;
    assert.match(
      text.replaceAll("\n", " "),
      /hop 1 \(.*\) and hop 3 \(.*\) \(silent in between: 2\)/,
    );
  });
});

testWith(
  [...NEEDS, "socat"],
  "behind a proxy, what the server reports is no evidence of the path",
  async () => {
    await stage(async ({ client, server }) => {
      const relay = "socat -d -d TCP4-LISTEN:8088,fork,reuseaddr TCP4:127.0.0.1:8086";
      await using proxy = new Background([...server.under, ...relay.split(" ")]);
      await proxy.until((said) => said.includes("listening on"));
      const url = URLS.IPv4.replace("8086", "8088");
      const { code, stdout, stderr } = await dscpGet(["--trace", "--json", url], client);
      const line = jsonOf(stdout);
      assert.deepEqual([code, line.changed], [0, null], stderr);
      assert.deepEqual(marksOf(line), [EF, EF, EF, null]);
      assert.equal(line.path[3].evidence, null);
      const text = (await dscpGet(["--trace", url], client)).stdout.replaceAll("\n", " ");
      assert.match(text, /was kept as far as hop 3 /);
    });
  },
);

testWith(
  NEEDS,
  "a packet that was changed behind its SYN is named, but no place for it",
  async () => {
    await stage(async ({ client, routers }) => {
      await filter(routers[0], "forward", "ct state established ip6 dscp ef ip6 dscp set cs1");
      const { code, stdout } = await dscpGet(["--trace", "--json", URLS.IPv6], client);
      const line = jsonOf(stdout);
      assert.deepEqual([code, line.changed, line.error!.code], [102, null, 102]);
      assert.deepEqual(marksOf(line), [EF, EF, EF, EF]);
      const text = await dscpGet(["--trace", URLS.IPv6], client);
      assert.match(
        text.stdout.replaceAll("\n", " "),
        /was kept all the way on the SYN, but data arrived as CS1 \(0x20\)\./,
      );
      assert.match(text.stderr, /^dscp-get: sent EF \(0xB8\), arrived CS1 \(0x20\): /m);
      const many = await dscpGet(["--trace", "-d", "EF,DF", URLS.IPv6], client);
      assert.match(many.stdout, /Of 2 marks: 1 changed \(EF\), 1 kept all the way \(DF\)\./);
    });
  },
);

testWith(
  NEEDS,
  "a trace says of which packets the server reports that they were kept",
  async () => {
    await stage(async ({ client }) => {
      const large = ["--trace", "-H", `X-Pad: ${"x".repeat(9000)}`];
      for (
        const [args, said] of [
          [["--trace", URLS.IPv6], "kept all the way: the server reports it."],
          [["--trace", URLS.IPv4], "kept all the way: the server reports it."],
          [[...large, URLS.IPv4], "kept all the way on the packets that the server reports."],
          [[...large, URLS.IPv6], "kept all the way on the packets that the server reports."],
        ] as const
      ) {
        const { stdout } = await dscpGet(args, client);
        assert.ok(stdout.replaceAll("\n", " ").includes(said), stdout);
      }
    });
  },
);

testWith(NEEDS, "a trace does not say kept of a request that this host changed", async () => {
  await stage(async ({ client }, clear) => {
    for (const [version, url] of [["ip", URLS.IPv4], ["ip6", URLS.IPv6]]) {
      const rule = `ct state established ${version} dscp ef ${version} dscp set cs1`;
      await filter(client, "output", rule);
      const { code, stdout } = await dscpGet(["--trace", url], client);
      assert.equal(code, 101);
      assert.match(
        stdout.replaceAll("\n", " "),
        /kept all the way on the SYN, but the request left this host as CS1 \(0x20\)\./,
      );
      const many = await dscpGet(["--trace", "-d", "EF,DF", url], client);
      assert.match(
        many.stdout.replaceAll("\n", " "),
        /EF was kept all the way on the SYN, but .* CS1 \(0x20\)\. Of 2 marks: 1 changed \(EF\), 1 kept all/,
      );
      await client.run("nft", "flush", "ruleset");
      await clear();
    }
  });
});

testWith(NEEDS, "a trace names what else went wrong", async () => {
  await stage(async ({ client, routers, server }) => {
    await rewrite(routers[0], "forward", "ef", "cs1");
    await using _python = await startPython(["8087"], server.under);
    const url = `${URLS.IPv4.replace("8086", "8087")}none`;
    const { code, stderr } = await dscpGet(["--trace", "-f", url], client);
    assert.equal(code, 102);
    assert.match(stderr, /changed EF .* between hop 1 and hop 2; the server answered 404 /);
  });
});

testWith(NEEDS, "a SYN that this host may have changed is not laid on the path alone", async () => {
  await stage(async ({ client }) => {
    const syn = "tcp flags & (syn | ack) == syn ip dscp ef ip dscp set cs1";
    await filter(client, "output", `'${syn}'`);
    const { code, stdout, stderr } = await dscpGet(["--trace", URLS.IPv4], client);
    assert.match(stderr, /: this host or the path changed EF .* between this host and hop 1/);
    assert.match(stdout, /^ {2}1 .* CS1 \(0x20\) {3}changed$/m);
    assert.equal(code, 102);
  });
});

testWith(NEEDS, "a prohibition, a refusal and a silent target end the path in words", async () => {
  await stage(async ({ client, routers, server }, clear) => {
    for (const [family, url] of Object.entries(URLS)) {
      await clear();
      await filter(routers[1], "forward", "reject with icmpx type admin-prohibited");
      const prohibited = await dscpGet(["--trace", "--json", url], client);
      const { path, error } = jsonOf(prohibited.stdout);
      assert.deepEqual(path.map(({ tos }) => tos), [EF, EF, EF], family);
      assert.match(path[2].answer!, /administratively prohibited$/);
      assert.match(
        error!.message,
        /cannot connect to .*: (10\.78\.2\.2|2001:db8:2::2) answers: .*prohibited$/,
      );
      assert.equal(prohibited.code, 7);

      await clear();
      const refused = await dscpGet(["--trace", url.replace("8086", "8087")], client);
      assert.equal(refused.code, 7, refused.stderr);
      assert.match(refused.stdout, /^ {2}4 {2}\S+ +[\d.]+ {2}connection refused$/m);
      assert.match(refused.stdout, /^EF \(0xB8\) was kept as far as hop 3 /m);

      await filter(server, "input", "tcp dport 8086 drop");
      const late = ["--trace", "--connect-timeout", "3", url];
      const silent = await dscpGet(late, client);
      assert.equal(silent.code, 28, silent.stderr);
      assert.match(silent.stdout, /^ {2}4 {2}\(no answer\)$/m);
      assert.match(silent.stderr, /connecting to \S+:8086 took longer than 3 seconds$/m);
    }
    const silent = await dscpGet(["--trace", URLS.IPv4], client);
    assert.equal(silent.code, 28, silent.stderr);
    assert.match(silent.stderr, /no answer from 10\.78\.4\.2:8086$/m);
    assert.equal(silent.stdout.match(/\(no answer\)/g)!.length, 27);
    assert.match(silent.stdout, /No answer within 5 s from hops 4 to 30\.\n$/);
  });
});

testWith(NEEDS, "a target beyond --max-hops is asked all the same", async () => {
  await stage(async ({ client }) => {
    const { code, stdout } = await dscpGet(
      ["--trace", "--json", "--max-hops", "2", URLS.IPv6],
      client,
    );
    assert.equal(code, 0);
    const { path } = jsonOf(stdout);
    assert.deepEqual(path.map(({ hop, tos }) => [hop, tos]), [[1, EF], [2, EF], [null, EF]]);
  });
});

testWith(NEEDS, "a router at an unknown distance is not taken for the target", async () => {
  await stage(async ({ client, routers: [near, far] }) => {
    // Two routers that send everything for a network to each other.
    await near.run("ip", "route", "add", "192.0.2.0/24", "via", "10.78.2.2");
    await far.run("ip", "route", "add", "192.0.2.0/24", "via", "10.78.2.1");
    await using capture = await Capture.start(8086, "far", near.under);
    const args = ["--trace", "--max-hops", "3", "http://192.0.2.1:8086/"];
    const { code, stdout, stderr } = await dscpGet(args, client);
    assert.equal(code, 7);
    assert.match(
      stdout,
      /^ +\? +10\.78\..* EF[^]*kept as far as 10\.78\.\d\.\d, at an unknown\s+distance, /m,
    );
    assert.ok(!stdout.includes("the target"), stdout);
    assert.match(stderr, /10\.78\.\d\.\d answers: time exceeded, as in a routing loop$/m);
    await capture.until((packets) => packets.length > 20); // one packet, again and again
  });
});

testWith(
  [...NEEDS, "setpriv"],
  "a router that refuses as the first hop is not taken for the target",
  async () => {
    await using nobody = await Nobody.create();
    await stage(async ({ client, routers: [near] }) => {
      await near.run("ip", "route", "add", "unreachable", "192.0.2.0/24");
      const args = ["--trace", "-d", "CS1", "http://192.0.2.1:8086/"];
      const { code, stdout } = await execute([...client.under, ...nobody.command, ...args]);
      assert.equal(code, 7);
      assert.match(stdout, /^ +1 +10\.78\.1\.2 .* unknown; host unreachable$/m);
      assert.ok(!stdout.includes("the target"), stdout);
    });
  },
);

testWith([...NEEDS, "openssl"], "the probe that connects carries https too", async () => {
  await using certificates = await Certificates.create();
  await using chain = await Chain.create();
  const { key, certificate } = certificates;
  const words = [
    "openssl",
    "s_server",
    "-accept",
    "4433",
    "-cert",
    certificate,
    "-key",
    key,
    "-www",
  ];
  await using server = new Background([...chain.server.under, ...words]);
  await server.until((said) => said.includes("ACCEPT"));
  const url = `https://${CHAIN_SERVER.ipv4}:4433/`;
  for (const marks of ["EF", "EF,DF"]) {
    const { code, stdout, stderr } = await dscpGet(
      ["--trace", "-k", "--json", "-d", marks, url],
      chain.client,
    );
    assert.equal(code, 0, stderr);
    for (const text of stdout.trim().split("\n")) {
      const { reply, sent, path } = JSON.parse(text);
      assert.deepEqual([reply.status, sent.proved, path.length], [200, true, 4]);
    }
  }
});

testWith(NEEDS, "several marks make one table, many are told in words", async () => {
  await stage(async ({ client, routers }) => {
    await rewrite(routers[0], "forward", "ef", "cs1");
    await rewrite(routers[0], "forward", "cs6", "cs0");
    const few = await dscpGet(["--trace", "-d", "EF,AF41,CS6", URLS.IPv4], client);
    assert.equal(few.code, 102);
    const lines = few.stdout.split("\n");
    assert.match(lines[0], /^hop {2}address +EF +AF41 +CS6$/);
    assert.match(lines[2], /^ {2}2 {2}10\.78\.2\.2 +CS1! +AF41 +(CS0|DF)!$/);
    assert.match(
      lines.slice(5).join(" "),
      /^Between hop 1 \(\S+\) and hop 2 \(\S+\): EF → CS1; CS6 → DF, by no single rule of RFC 9435\. Of 3 marks: /,
    );
    const all = await dscpGet(["--trace", "-d", "all", URLS.IPv6], client);
    assert.equal(all.code, 102);
    assert.match(all.stdout, /^Between hop 1 .*\n?.*EF → CS1/m);
    assert.match(all.stdout, /Of 64 marks: 62 kept all the way, 2 changed \(EF, CS6\)\.\n$/);
    const json = await dscpGet(["--trace", "--json", "-d", "EF,CS6", URLS.IPv4], client);
    const paths = json.stdout.trim().split("\n").map((line) => marksOf(jsonOf(line)));
    assert.deepEqual(paths, [[EF, CS1, CS1, CS1], [0xc0, 0, 0, 0]]);
  });
});

testWith(
  NEEDS,
  "a hop that limits its answers is asked again, and else called partly silent",
  async () => {
    await stage(async ({ client, routers }) => {
      const limit = (milliseconds: number) =>
        routers[1].script(
          `sysctl -qw net.ipv4.icmp_ratemask=6168 net.ipv4.icmp_ratelimit=${milliseconds}`,
        );
      await limit(60_000);
      const marks = ["-d", "EF,CS1,CS2,CS3,CS4,CS5,CS6,CS7"];
      const short = ["--trace", "--connect-timeout", "0.9", ...marks, URLS.IPv4];
      const { stdout } = await dscpGet(short, client);
      assert.match(
        stdout,
        /^Hop 2 \(10\.78\.2\.2\) is partly silent: it answered \d of \d probes\.$/m,
      );
      await limit(1000);
      // Only then the answers can change what is said.
      await filter(routers[0], "forward", "ip dscp set af41");
      const { stdout: json } = await dscpGet(["--trace", "--json", ...marks, URLS.IPv4], client);
      for (const line of json.trim().split("\n")) assert.ok(!marksOf(jsonOf(line)).includes(null));
    });
  },
);

testWith(
  [...NEEDS, "python3"],
  "a forged ICMP message is ignored unless it quotes this very probe",
  async () => {
    await stage(async ({ client, routers }) => {
      await filter(routers[1], "output", "icmp type time-exceeded drop");
      for (
        const [forgery, tos] of [["port", null], ["host", null], ["sequence", null], ["", 0x28]]
      ) {
        await using forger = new Background([
          ...routers[0].under,
          "python3",
          "-u",
          "-c",
          FORGER,
          `${forgery}`,
        ]);
        await forger.until((said) => said.includes("ready"));
        const { stdout } = await dscpGet(["--trace", "--json", URLS.IPv4], client);
        const { path } = jsonOf(stdout);
        assert.deepEqual(path.map(({ tos }) => tos), [EF, tos, EF, EF], `${forgery}`);
        assert.match(forger.said, /forged/);
      }
    });
  },
);

/** Answers each SYN that passes r1 with an ICMP message "from r2" that quotes it with one change. */
const FORGER = `
import socket, struct, sys
forgery = sys.argv[1]
def checksum(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
listen = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
listen.bind(("near", 0))
send = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
print("ready")
while True:
    packet = bytearray(listen.recv(2048))
    if packet[9] != 6 or packet[20 + 13] != 2 or packet[8] != 2: continue
    packet[1] = 0x28
    if forgery == "port": packet[21] ^= 1
    if forgery == "host": packet[19] ^= 1
    if forgery == "sequence": packet[24] ^= 0x40
    quote = bytes(packet[:28])
    icmp = struct.pack("!BBHI", 11, 0, checksum(struct.pack("!BBHI", 11, 0, 0, 0) + quote), 0) + quote
    router, client = socket.inet_aton("10.78.2.2"), bytes(packet[12:16])
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp), 0, 0, 64, 1, 0, router, client)
    send.sendto(head + icmp, (socket.inet_ntoa(client), 0))
    print("forged")
`;

testWith(NEEDS, "with two routes of different marks, all climbs of a trace take one", async () => {
  await stage(async ({ client, routers: [r1, r2] }) => {
    await r1.script(
      `ip link add other type veth peer name other netns ${r2.name}`,
      "ip addr add 10.78.9.1/24 dev other; ip addr add 2001:db8:9::1/64 nodad dev other",
      // By addresses and ports in the packet: policy 1 would take the sending socket's own hash.
      "ip link set other up; sysctl -qw net.ipv4.fib_multipath_hash_policy=3 " +
        "net.ipv4.fib_multipath_hash_fields=55",
    );
    await r2.script(
      "ip addr add 10.78.9.2/24 dev other; ip addr add 2001:db8:9::2/64 nodad dev other",
      "ip link set other up; nft add table inet q",
      "nft 'add chain inet q p { type filter hook prerouting priority mangle; }'",
      "nft add rule inet q p iifname other ip dscp ef ip dscp set cs1",
      "nft add rule inet q p iifname other ip6 dscp ef ip6 dscp set cs1",
      "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.other.rp_filter=0",
      "until ip -6 -oneline address show dev other scope link | grep -q fe80; do sleep 0.01; done",
    );
    await r1.script(
      "ip route replace 10.78.4.0/24 nexthop via 10.78.2.2 nexthop via 10.78.9.2",
      "ip route replace 2001:db8:4::/64 nexthop via 2001:db8:2::2 nexthop via 2001:db8:9::2",
    );
    const ten = Array(10).fill("EF").join(",");
    for (const url of Object.values(URLS)) {
      const { stdout } = await dscpGet(["--trace", "--json", "-d", ten, url], client);
      const paths = stdout.trim().split("\n").map((line) => marksOf(jsonOf(line)).join(" "));
      assert.equal(paths.length, 10);
      assert.equal(new Set(paths).size, 1, paths.join("; "));
    }
    // Other ports take the other route, so the above is not by chance.
    const seen = new Set<string>();
    for (let run = 0; run < 40 && seen.size < 2; run++) {
      const { stdout } = await dscpGet(["--trace", "--json", URLS.IPv4], client);
      seen.add(marksOf(jsonOf(stdout)).join(" "));
    }
    assert.equal(seen.size, 2, [...seen].join("; "));
  });
});

testWith(NEEDS, "-m ends a trace that finds no server", async () => {
  await stage(async ({ client, routers }) => {
    await filter(routers[0], "forward", "drop");
    const { code, stderr } = await dscpGet(["--trace", "-m", "0.5", URLS.IPv4], client);
    assert.equal(code, 28);
    assert.match(stderr, /connecting to 10\.78\.4\.2:8086 took longer than 0\.5 seconds/);
  });
});

testWith(NEEDS, "Ctrl-C at any moment prints what is known, 130", async () => {
  await stage(async ({ client, server }) => {
    await filter(server, "input", "tcp dport 8086 drop");
    for (const rows of [1, 2, 3, 4, 5]) {
      await using run = new Background(command(["--trace", URLS.IPv6], client));
      await run.until((said) => said.split("\n").length > rows + 1);
      const { code } = await run.stop("SIGINT");
      assert.equal(code, 130, run.said);
      assert.match(run.said, /^EF \(0xB8\) was kept as far as hop [123] /m);
    }
    for (const args of [["--json"], ["-d", "EF,DF"]]) {
      await using capture = await Capture.start(8086, "far", client.under);
      await using run = new Background(command(["--trace", ...args, URLS.IPv4], client));
      await capture.until((packets) => packets.length > 3);
      const { code } = await run.stop("SIGTERM");
      assert.equal(code, 143, run.said);
      if (args[0] === "--json") {
        const [text, ...rest] = run.said.split("\n");
        const line = jsonOf(text) as unknown as { error: { code: number }; url: string };
        assert.deepEqual([line.error.code, line.url], [143, URLS.IPv4]);
        assert.deepEqual(rest, ["dscp-get: interrupted", ""]);
      } else assert.match(run.said, /Of 1 mark: /);
    }
  });
});

// ─── Without a network ───────────────────────────────────────────────────────────────────────────

Deno.test("of a trace that is interrupted while it waits for the reply, what left is told", async () => {
  let asked = Promise.withResolvers<void>();
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    asked.resolve();
    await conn.read(new Uint8Array(1));
  });
  const interrupted = async (...args: string[]) => {
    asked = Promise.withResolvers();
    await using run = new Background(command(["--trace", ...args, server.url]));
    await asked.promise;
    assert.equal((await run.stop("SIGINT")).code, 130);
    return run.said;
  };
  const [line, ...rest] = (await interrupted("--json")).split("\n");
  const { sent, error } = JSON.parse(line);
  assert.deepEqual(
    [sent.proved, sent.bytes.seen === sent.bytes.sent, error.code],
    [true, true, 130],
  );
  assert.ok(sent.bytes.sent > 0);
  assert.deepEqual(rest, ["dscp-get: interrupted", ""]);
  assert.match(
    await interrupted(),
    /^hop .*\n +1 .*connected\nEF [^]*\nconnected .*\nmark .*\nsent +1 packet with 0xB8, .*: proved\n(.*\n)*dscp-get: interrupted\n$/,
  );
});

Deno.test("without routers the server is the first hop, also the built-in one", async () => {
  await using server = await FarEnd.start();
  for (const args of [[server.url], []]) {
    const { code, stdout } = await dscpGet(["--trace", "--json", ...args]);
    assert.equal(code, 0);
    const { path, changed } = jsonOf(stdout);
    assert.equal(changed, null);
    assert.deepEqual(path.map(({ hop, tos, answer }) => [hop, tos, answer]), [[
      1,
      EF,
      "connected",
    ]]);
  }
});

Deno.test("of several addresses one that refuses is left for the next", async () => {
  await using servers = new AsyncDisposableStack();
  // Whichever of the two addresses of localhost comes first.
  for (const address of ["127.0.0.1", "[::1]"]) {
    const server = servers.use(await FarEnd.start(`${address}:0`));
    const { port } = new URL(server.url);
    const { code, stdout, stderr } = await dscpGet([
      "--trace",
      "--json",
      `http://localhost:${port}/`,
    ]);
    assert.equal(code, 0, stderr);
    const hops = jsonOf(stdout).path.map(({ hop, answer }) => [hop, answer]);
    assert.deepEqual(hops, [[1, "connected"]]);
  }
});

Deno.test("a target that is the first hop and reports nothing is not called a silent path", async () => {
  await using server = replying(OK);
  const { code, stdout } = await dscpGet(["--trace", server.url]);
  assert.equal(code, 0);
  assert.match(stdout, /not shown: the first hop is the target, which does not\s+report it\.\n$/);
});

Deno.test("--trace asks --allow-net first, and libc nothing without it", async () => {
  await using server = replying(OK);
  const flags = ["--allow-net=127.0.0.2", "--allow-ffi"];
  const { code, stdout, stderr } = await dscpGet(["--trace", server.url], { flags });
  assert.deepEqual([code, stdout], [103, ""]);
  assert.match(stderr, /no permission to use 127\.0\.0\.1:/);
  const enough = { flags: [`--allow-net=127.0.0.1:${server.port}`, "--allow-ffi"] };
  assert.equal((await dscpGet(["--trace", server.url], enough)).code, 0);
  assert.equal(server.requests.length, 1);
});

Deno.test("a host that is not there has no table, and the words of the plain path", async () => {
  for (const args of [["http://does-not-exist.invalid/"], ["-6", "http://127.0.0.1/"]]) {
    const [plain, traced] = [await dscpGet(args), await dscpGet(["--trace", ...args])];
    assert.deepEqual([traced.code, traced.stdout], [args[0] === "-6" ? 7 : 6, ""]);
    assert.equal(traced.stderr, plain.stderr);
  }
});

Deno.test("--max-hops and --trace refuse what makes no sense", async () => {
  for (
    const [args, message] of [
      [["--trace", "--max-hops", "0"], /--max-hops takes a number from 1 to 64, not '0'/],
      [["--trace", "--max-hops", "65"], /not '65'/],
      [["--trace", "-n", "2"], /--trace and --count are mutually exclusive/],
    ] as const
  ) {
    const { code, stderr } = await dscpGet(args);
    assert.equal(code, 2);
    assert.match(stderr, message);
  }
});

Deno.test("trace() gives the hops, then the exchange, and leaves descriptors as they were", async () => {
  await using server = replying(OK);
  const port = closedPort();
  const traceOnce = async (url: string) => {
    const path = await trace(url, { dscp: "AF41" });
    const hops: Hop[] = [];
    for await (const hop of path) hops.push(hop);
    assert.deepEqual(hops, path.path);
    return path;
  };
  await traceOnce(server.url);
  const before = openDescriptors();
  for (let at = 0; at < 20; at++) {
    const { exchange, failure, path } = await traceOnce(server.url);
    assert.deepEqual([failure, exchange!.reply!.status, exchange!.mark.tos], [null, 200, 0x88]);
    assert.deepEqual([path.length, path[0].address], [1, "127.0.0.1"]);
    assert.ok(exchange!.milliseconds.total! >= exchange!.milliseconds.connect!);
    const refused = await traceOnce(`http://127.0.0.1:${port}/`);
    assert.equal(refused.failure!.code, 7);
    assert.equal(refused.path[0].answer, "connection refused");
    for await (const _hop of await trace(server.url)) break;
  }
  // The server's ends, in this same process, close some turns of the event loop later.
  for (let turn = 0; openDescriptors() > before && turn < 1000; turn++) {
    await new Promise((resolve) => setImmediate(resolve));
  }
  assert.ok(openDescriptors() <= before);
  await assert.rejects(trace(server.url, { maxHops: 65 }), RangeError);
  await assert.rejects(trace(server.url, { dscp: "XX" }), RangeError);
});

Deno.test("trace() has the defaults of --trace, and less time for the path if maxTime is less", () => {
  for (
    const [options, path, all] of [
      [{}, 60, 30],
      [{ maxTime: 5 }, 5, 5],
      [{ maxTime: 99 }, 60, 99],
      [{ maxTime: 0 }, 60, 0],
      [{ maxTime: 5, connectTimeout: 0 }, 0, 5],
      [{ maxTime: 5, connectTimeout: 99 }, 99, 5],
    ] as const
  ) {
    const { connectTimeout, maxTime, maxHops } = traceOptionsOf(options);
    assert.deepEqual([connectTimeout, maxTime, maxHops], [path, all, DEFAULTS.maxHops]);
  }
  assert.throws(() => traceOptionsOf({ maxTime: -1 }), RangeError);
  assert.throws(() => traceOptionsOf({ maxTime: NaN }), RangeError);
});

// ─── Parsers ─────────────────────────────────────────────────────────────────────────────────────

const REMOTE = encode({ transport: "tcp", hostname: "10.78.4.2", port: 8086 });
/** Ports 40000 and 8086, and a sequence number. */
const TRANSPORT = fromHex("9c40 1f96 01020304");

/** A control message, cmsg(3). */
function control(level: number, type: number, value: Uint8Array): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(16 + Math.ceil(value.length / 8) * 8),
    view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(16 + value.length), true);
  view.setInt32(8, level, true);
  view.setInt32(12, type, true);
  bytes.set(value, 16);
  return bytes;
}

// EHOSTUNREACH, ICMP, time exceeded; sockaddr_in 10.78.2.2
const ERROR4 = fromHex(
  "71000000 02 0b 00 00 00000000 00000000 0200 0000 0a4e0202 0000000000000000",
);
// EHOSTUNREACH, ICMPv6, time exceeded; sockaddr_in6 2001:db8:2::2
const ERROR6 = fromHex(
  "71000000 03 03 00 00 00000000 00000000" +
    "0a00 0000 00000000 20010db8000200000000000000000002 00000000",
);
const FLOW_EF = fromHex("0a00 1f96 0b812345 20010db8000400000000000000000002 00000000");
const NAME4 = fromHex("0200 1f96 0a4e0402 0000000000000000");

const message4 = {
  name: NAME4,
  control: new Uint8Array([...control(0, 1, fromHex("d8")), ...control(0, 11, ERROR4)]),
  data: TRANSPORT,
  flags: 0x2000,
};
const message6 = {
  name: FLOW_EF,
  control: control(41, 25, ERROR6),
  data: TRANSPORT,
  flags: 0x2000,
};
/** From 10.78.2.2 with ToS 0xD8: time exceeded, about a SYN with ToS 0x20 to REMOTE. */
const PACKET = fromHex(
  "45d80038 00000000 40010000 0a4e0202 0a4e0101 0b000000 00000000" +
    "45200028 00004000 01060000 0a4e0101 0a4e0402 9c401f96 01020304",
);

Deno.test("the parsers read what the kernel hands over", () => {
  const four = parseIcmpError(message4)!;
  assert.deepEqual(
    [four.version, four.type, four.code, four.router, four.tos, four.icmpTos],
    [4, 11, 0, "10.78.2.2", null, 0xd8],
  );
  const six = parseIcmpError(message6)!;
  assert.deepEqual(
    [six.version, six.type, six.code, six.router, six.tos, six.icmpTos],
    [6, 3, 0, "2001:db8:2::2", 0xb8, null],
  );
  assert.deepEqual(parseQuote(PACKET, four, REMOTE), { tos: 0x20, icmpTos: 0xd8 });
  assert.equal(icmpMeaning(four), "time exceeded");
});

Deno.test("an ICMP error is named as its RFC does, and one that has no name by its numbers", () => {
  const UNREACHABLE: Record<number, Record<number, string>> = {
    // RFC 792, RFC 1812 section 5.2.7.1
    4: {
      0: "network unreachable",
      1: "host unreachable",
      2: "protocol unreachable",
      3: "port unreachable",
      6: "network unknown",
      7: "host unknown",
      9: "network administratively prohibited",
      10: "host administratively prohibited",
      11: "network unreachable for this ToS",
      12: "host unreachable for this ToS",
      13: "administratively prohibited",
    },
    // RFC 4443 section 3.1
    6: {
      0: "no route",
      1: "administratively prohibited",
      2: "beyond scope of source address",
      3: "address unreachable",
      4: "port unreachable",
      5: "source address failed policy",
      6: "reject route",
    },
  };
  for (
    const [version, exceeded, unreachable, parameter] of [[4, 11, 3, 12], [6, 3, 1, 4]] as const
  ) {
    for (let type = 0; type < 256; type++) {
      for (let code = 0; code < 16; code++) {
        const known = type === exceeded && code === 0
          ? "time exceeded"
          : type === parameter
          ? "parameter problem"
          : type === unreachable
          ? UNREACHABLE[version][code]
          : undefined;
        const numbers = `ICMP${version === 6 ? "v6" : ""} type ${type} code ${code}`;
        assert.equal(icmpMeaning({ version, type, code }), known ?? numbers);
      }
    }
  }
});

testWith(NEEDS, "a hop that does not answer the first probe is probed once more", async () => {
  await stage(async ({ client, routers }) => {
    // Of the packets that would leave, the first is dropped, the second passes, and so on.
    await filter(routers[1], "output", "icmp type time-exceeded numgen inc mod 2 == 0 drop");
    const { stdout, stderr } = await dscpGet(["--trace", "--json", URLS.IPv4], client);
    assert.deepEqual(marksOf(jsonOf(stdout)), [EF, EF, EF, EF], stderr);
  });
});

testWith(
  ["root", "ip"],
  "a trace goes on to the next address if one cannot be reached",
  async () => {
    await using namespace = await Namespace.create(`2001:db8::9 server.example
127.0.0.1 server.example
`);
    await using _server = await FarEnd.start("127.0.0.1:8086", namespace.under);
    const args = ["--trace", "--json", "http://server.example:8086/"];
    const { code, stdout, stderr } = await dscpGet(args, namespace);
    const { path } = jsonOf(stdout);
    assert.deepEqual([code, path.map(({ address }) => address)], [0, ["127.0.0.1"]], stderr);
  },
);

Deno.test("truncated control data is no evidence, and no length makes a parser fail", () => {
  const four = parseIcmpError(message4)!;
  for (const message of [message4, message6]) {
    assert.equal(parseIcmpError({ ...message, flags: 0x2008 }), null);
    const needed = message === message4 ? 24 + 16 + 32 : 16 + 44;
    for (let size = 0; size < message.control.length; size++) {
      const cut = parseIcmpError({ ...message, control: message.control.slice(0, size) });
      assert.equal(cut === null, size < needed, String(size));
    }
    for (let size = 0; size < message.name.length; size++) {
      assert.equal(parseIcmpError({ ...message, name: message.name.slice(0, size) })!.tos, null);
    }
  }
  for (let size = 0; size < PACKET.length; size++) {
    assert.equal(parseQuote(PACKET.slice(0, size), four, REMOTE), null, String(size));
  }
  // Without ports and sequence number nothing shows whose probe it is.
  const short = parseIcmpError({ ...message4, data: TRANSPORT.slice(0, 7) })!;
  assert.equal(parseQuote(PACKET, short, REMOTE), null);
});

Deno.test("a quote of another packet is no evidence", () => {
  const four = parseIcmpError(message4)!;
  // Version, protocol, router; type, code; version, protocol, target, ports, sequence number
  for (const at of [0, 9, 12, 15, 20, 21, 28, 37, 44, 47, 48, 49, 50, 51, 52, 55]) {
    const other = PACKET.slice();
    other[at] ^= 0x10;
    assert.equal(parseQuote(other, four, REMOTE), null, String(at));
  }
});

Deno.test("random bytes into the parsers: no error, and no evidence from noise", () => {
  const random = new Random(SEED), four = parseIcmpError(message4)!;
  const bytes = (size: number) => Uint8Array.from({ length: size }, () => random.below(256));
  const damaged = (whole: Uint8Array<ArrayBuffer>) => {
    const copy = whole.slice(0, random.mostly(whole.length, random.below(whole.length + 1)));
    for (let times = random.below(4); times > 0 && copy.length > 0; times--) {
      copy[random.below(copy.length)] = random.oneOf([0, 1, 0x7f, 0x80, 0xff, random.below(256)]);
    }
    return copy;
  };
  for (let run = 0; run < 20_000; run++) {
    const { name, control, data, flags } = random.oneOf([message4, message6]);
    const error = parseIcmpError({ name: damaged(name), control: damaged(control), data, flags });
    if (error !== null) {
      icmpMeaning(error);
      assert.ok(error.tos === null || (error.tos >= 0 && error.tos <= 255), `SEED=${SEED}`);
    }
    const noise = bytes(random.below(120));
    parseIcmpError({ name: noise, control: noise, data: noise, flags: 0 });
    assert.equal(parseQuote(noise, four, REMOTE), null, `SEED=${SEED}`);
    parseQuote(damaged(PACKET), four, REMOTE);
  }
});
