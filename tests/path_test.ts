import assert from "node:assert/strict";
import * as libc from "../ffi/libc.ts";
import type { Hop } from "../ffi/mod.ts";
import { setOption } from "../ffi/calls.ts";
import { anyEnd, openPort, setResetOnClose } from "../ffi/probe.ts";
import { AF_INET, encode } from "../ffi/sockaddr.ts";
import { FAR_SERVER, type Router, routerAddress, SimulatedPath } from "./support/paths.ts";
import { command, dscpGet, execute, Nobody, onTerminal, testWith } from "./support/processes.ts";
import { FarEnd } from "./support/servers.ts";

const NEEDS = ["root", "ip", "python3"];
const URLS = {
  IPv4: `http://${FAR_SERVER.ipv4}:8086/`,
  IPv6: `http://[${FAR_SERVER.ipv6}]:8086/`,
};
const EF = 0xb8, AF41 = 0x88, AF31 = 0x68, CS1 = 0x20;
const TO_CS1 = { [EF]: CS1 };

/** What is used of a line of JSON. */
interface Line {
  readonly path: readonly Hop[];
  readonly changed: { readonly after: number; readonly at: number } | null;
  readonly reply?: { readonly status: number };
}

const jsonOf = (stdout: string): Line => JSON.parse(stdout);
const hopsOf = ({ path }: Line) => path.map(({ hop, tos }) => [hop, tos]);

/** A path with a far end of ours behind it. */
async function walk(
  routers: readonly Router[],
  play: (path: SimulatedPath) => Promise<void>,
  late = 0,
): Promise<void> {
  await using path = await SimulatedPath.create(routers, late);
  await using _server = await FarEnd.start("[::]:8086", path.server.under);
  await play(path);
}

testWith(NEEDS, "where all routers answer at once, each is probed once", async () => {
  await walk([{}, {}, {}], async (path) => {
    assert.equal((await dscpGet(["--trace", URLS.IPv4], path.client)).code, 0);
    const syns = await path.syns();
    assert.deepEqual(syns.map(({ ttl }) => ttl), [1, 2, 3, 4]);
    assert.equal(new Set(syns.map(({ port }) => port)).size, 1);
  });
});

testWith(NEEDS, "a firewall that rejects probes is not the target", async () => {
  for (
    const [icmp, url, said] of [
      [[3, 13], URLS.IPv4, "administratively prohibited"],
      [[3, 1], URLS.IPv4, "host unreachable"],
      [[12, 0], URLS.IPv4, "parameter problem"],
      [undefined, URLS.IPv4, "refused this probe only"],
      [[1, 1], URLS.IPv6, "administratively prohibited"],
      [[4, 0], URLS.IPv6, "parameter problem"],
      [undefined, URLS.IPv6, "refused this probe only"],
    ] as const
  ) {
    await walk([{}, { rejects: { below: 20, icmp } }, {}], async ({ client }) => {
      const { code, stdout, stderr } = await dscpGet(["--trace", "--json", url], client);
      assert.equal(code, 0, stderr);
      const answers = jsonOf(stdout).path.map(({ hop, answer }) => [hop, answer]);
      const exceeded = [1, 2].map((hop) => [hop, "time exceeded"]);
      assert.deepEqual(answers, [...exceeded, [3, said], [null, "connected"]]);
      const text = await dscpGet(["--trace", url], client);
      assert.match(text.stdout, new RegExp(`^ {2}3 .*; ${said}$`, "m"));
      assert.match(text.stdout, /was kept all the way/);
    });
  }
  // What rejects all is said as it is.
  const all = { rejects: { below: 255, icmp: [3, 13] as const } };
  await walk([all, {}], async ({ client }) => {
    const { code, stdout, stderr } = await dscpGet(["--trace", URLS.IPv4], client);
    assert.equal(code, 7);
    assert.match(stdout, /, and rejected: administratively\s+prohibited\.$/m);
    assert.match(stderr, /10\.99\.1\.1 answers: administratively prohibited$/m);
  });
});

testWith(NEEDS, "hops that disagree are not called a change back", async () => {
  const routers = [{}, { rewrites: TO_CS1, alternates: true }, {}, {}, {}];
  await walk(routers, async ({ client }) => {
    const { code, stdout, stderr } = await dscpGet(["--trace", URLS.IPv6], client);
    assert.equal(code, 102);
    const text = stdout.replaceAll("\n", " ");
    assert.match(
      text,
      /as CS1 \(0x20\) by hops 3, 5: the hops disagree, as if packets took several/,
    );
    assert.doesNotMatch(text, /changed to/);
    assert.match(stderr, /^dscp-get: the hops disagree on EF/m);
  });
});

const beside: (() => Promise<void>)[] = [];
let outcomes: Promise<unknown>[] | undefined;

/** Declares a test that mostly waits: all of these run at the same time, in their own namespaces. */
function testBeside(needs: readonly string[], name: string, run: () => Promise<void>): void {
  const at = beside.push(run) - 1;
  testWith(needs, name, async () => {
    outcomes ??= beside.map((run) => run().then(() => null, (error) => error));
    const error = await outcomes[at];
    if (error !== null) throw error;
  });
}

testBeside(
  [...NEEDS, "setpriv"],
  "routers that answer within 5 seconds are seen, behind a quick one too, and a change there",
  async () => {
    await using nobody = await Nobody.create();
    const routers = [{}, { late: 220, rewrites: TO_CS1 }, { late: 950 }, {}, { late: 4500 }];
    await walk(routers, async ({ client }) => {
      for (
        const [words, url] of [
          [command([], client), URLS.IPv4],
          [[...client.under, ...nobody.command], URLS.IPv6],
        ] as const
      ) {
        const { code, stdout } = await execute([...words, "--trace", "--json", url]);
        const line = jsonOf(stdout);
        assert.deepEqual(hopsOf(line), [[1, EF], [2, EF], [3, CS1], [4, CS1], [5, CS1], [6, CS1]]);
        assert.deepEqual([line.changed!.after, line.changed!.at, code], [2, 3, 102]);
        assert.ok(line.path[4].milliseconds! >= 4500);
        assert.ok(line.path.every(({ waited }) => waited === null));
      }
    });
  },
);

testBeside(
  NEEDS,
  "a path that is slow behind its first hop has its hops and its distance",
  async () => {
    for (const late of [600, 1500]) {
      await walk([{}, { late }, { late }], async ({ client }) => {
        const { code, stdout } = await dscpGet(["--trace", "--json", URLS.IPv6], client);
        const hops = jsonOf(stdout).path.map(({ hop, answer }) => [hop, answer]);
        const exceeded = [1, 2, 3].map((hop) => [hop, "time exceeded"]);
        assert.deepEqual(hops, [...exceeded, [4, "connected"]]);
        assert.equal(code, 0);
      }, late);
    }
  },
);

testBeside(
  NEEDS,
  "a hop that stays silent is waited for as long as the limit allows, and said",
  async () => {
    await walk([{}, { silent: true, rewrites: TO_CS1 }, {}], async ({ client }) => {
      const { code, stdout } = await dscpGet(["--trace", URLS.IPv4], client);
      assert.equal(code, 102);
      assert.match(stdout, /\n {2}2 {2}\(no answer\)\n {2}3 .*changed\n {2}4 .*connected/);
      assert.equal(stdout.match(/\(no answer\)/g)!.length, 1);
      assert.match(
        stdout.replaceAll("\n", " "),
        /\(silent in between: 2\).* No answer within 5 s from hop 2\. $/,
      );
      // Half of what is left of the limit.
      const short = ["--trace", "--json", "--connect-timeout", "4", URLS.IPv4];
      const line = jsonOf((await dscpGet(short, client)).stdout);
      const { waited } = line.path[1];
      assert.ok(waited! > 0 && waited! < 2000, String(waited));
      assert.deepEqual([line.path[3].answer, line.reply!.status], ["connected", 200]);
      // Nothing is left.
      const none = ["--trace", "--json", "--connect-timeout", "1.3", URLS.IPv4];
      const { path, reply } = jsonOf((await dscpGet(none, client)).stdout);
      assert.deepEqual([path[3].answer, reply!.status], ["connected", 200]);
    });
  },
);

testBeside(
  NEEDS,
  "a late hop has one row when it was silent, and one when it answers",
  async () => {
    await walk([{ late: 1500 }], async ({ client }) => {
      const { stdout } = await dscpGet(["--trace", URLS.IPv4], client);
      assert.match(
        stdout,
        /^hop .*\n {2}1 {2}\(no answer\)\n {2}1 {2}10\.99\.1\.1 .*EF \(0xB8\)\n {2}2 .*connected; .*\nEF /,
      );
    });
  },
);

testBeside(NEEDS, "a change behind nine silent hops is found", async () => {
  const silent = Array(9).fill({ silent: true });
  await walk([{}, ...silent, { rewrites: TO_CS1 }, {}], async ({ client }) => {
    const { code, stdout } = await dscpGet(["--trace", "--json", URLS.IPv4], client);
    const line = jsonOf(stdout);
    assert.equal(code, 102);
    assert.deepEqual(line.changed, { after: 11, at: 12, from: EF, to: CS1 });
    assert.deepEqual(hopsOf(line).slice(9), [[10, null], [11, EF], [12, CS1], [13, CS1]]);
    assert.ok(line.path.slice(1, 10).every(({ waited }) => waited === 5000));
  });
});

testBeside(NEEDS, "a path that no longer answers is probed up to --max-hops", async () => {
  const drops = { drops: [EF] };
  await walk([{}, drops, {}], async (path) => {
    const args = ["--trace", "--max-hops", "9", URLS.IPv6];
    const { code, stdout } = await dscpGet(args, path.client);
    assert.equal(code, 28);
    assert.match(
      stdout.replaceAll("\n", " "),
      /kept as far as hop 2 .*, and nothing behind it answered\. No answer within 5 s from hops 3 to 9\. $/,
    );
    assert.equal(
      Math.max(...(await path.syns()).map(({ ttl }) => ttl).filter((ttl) => ttl < 60)),
      9,
    );
  });
});

testBeside(
  NEEDS,
  "behind a firewall that passes one SYN of two ports the target is reached",
  async () => {
    await walk([{}, { once: true }, {}], async ({ client }) => {
      const { code, stdout, stderr } = await dscpGet(["--trace", URLS.IPv6], client);
      assert.equal(code, 0, stderr);
      assert.match(stdout, /\n {2}\? {2}\S+ +[\d.]+ {2}connected; server reports SYN EF/);
      assert.match(stdout.replaceAll("\n", " "), /The target answered only another port than/);
    });
  },
);

testBeside(
  NEEDS,
  "marks that are dropped are named with their place, whatever their order",
  async () => {
    const drops = { drops: [EF, AF41, AF31] };
    await walk([{}, drops, {}], async (path) => {
      const { ipv4 } = routerAddress(3);
      for (const order of ["EF,AF41,AF31,DF", "DF,AF31,AF41,EF"]) {
        const args = ["--trace", "--max-hops", "5", "-d", order, URLS.IPv4];
        const { code, stdout } = await dscpGet(args, path.client);
        assert.equal(code, 28);
        const text = stdout.replaceAll("\n", " ");
        const dropped = order.split(",").filter((mark) => mark !== "DF").join(", ");
        const place = `between hop 2 (${routerAddress(2).ipv4}) and hop 3 (${ipv4})`;
        assert.ok(text.includes(`${dropped} are dropped ${place}; DF passes.`), text);
        assert.match(text, /Of 4 marks: .*3 dropped/);
        assert.match(text, /1 kept all the way \(DF\)/);
        assert.doesNotMatch(text, /partly silent|No answer/);
        assert.match(stdout, new RegExp(`^ {2}3 {2}${ipv4} .*DF`, "m"));
      }
    });
  },
);

testBeside(
  NEEDS,
  "silent hops are asked again only where that can change what is said",
  async () => {
    // The second hop does not answer; both its neighbours received the mark.
    await walk([{}, { silent: true }, { late: 900 }], async (path) => {
      const args = ["--trace", "-d", "EF,AF41", URLS.IPv4];
      assert.equal((await dscpGet(args, path.client)).code, 0);
      const ttls = (await path.syns()).map(({ tos, ttl }) => [tos, ttl]);
      const first = [1, 2, 2, 3, 3, 4].map((ttl) => [EF, ttl]);
      // Known to let marks pass without an answer, also a second later.
      const second = [1, 3, 4].map((ttl) => [AF41, ttl]);
      assert.deepEqual(ttls, [...first, ...second]);
    });
    await walk([{}, { late: 2500, rewrites: TO_CS1 }, {}], async (path) => {
      const args = ["--trace", "--json", "-d", "EF,AF41", URLS.IPv4];
      const lines = (await dscpGet(args, path.client)).stdout.trim().split("\n").map(jsonOf);
      assert.deepEqual(lines.map(hopsOf), [
        [[1, EF], [2, EF], [3, CS1], [4, CS1]],
        [[1, AF41], [2, null], [3, AF41], [4, AF41]],
      ]);
      assert.deepEqual([lines[0].changed!.after, lines[0].changed!.at], [2, 3]);
    });
  },
);

testBeside([...NEEDS, "script"], "what is waited for shows on a terminal", async () => {
  await walk([{}, { silent: true, rewrites: TO_CS1 }, { late: 1200 }], async ({ client }) => {
    const run = (...args: string[]) =>
      execute([...client.under, ...onTerminal(command(["--trace", ...args, URLS.IPv4]).join(" "))]);
    const one = await run();
    assert.match(one.stdout, /waiting 5 s for silent hops, Ctrl-C to stop/);
    const many = await run("-d", "EF,CS2");
    assert.match(many.stdout, /1 of 2 marks, Ctrl-C to stop/);
    assert.match(many.stdout, /1 of 2 marks, hop \d, Ctrl-C to stop/);
    assert.match(many.stdout, /\d of \d silent hops asked again, Ctrl-C to stop/);
  });
});

Deno.test("a probe that is given up frees its ends, also if it has been answered", () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { hostname, port } = listener.addr as Deno.NetAddr;
  const remote = encode({ transport: "tcp", hostname, port }), local = anyEnd(AF_INET);
  const anchor = openPort(local);
  try {
    for (let times = 0; times < 3; times++) {
      const fd = libc.socket(AF_INET);
      setOption(fd, libc.SO_REUSEADDR, 1);
      assert.equal(libc.bind(fd, local), 0);
      setResetOnClose(fd, true);
      // The handshake is over when the call returns.
      const result = libc.connect(fd, remote);
      assert.ok([0, -libc.EINPROGRESS].includes(result), String(result));
      assert.equal(libc.getpeername(fd, new Uint8Array(28)), 0);
      libc.close(fd);
    }
  } finally {
    libc.close(anchor);
  }
});
