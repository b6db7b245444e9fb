import assert from "node:assert/strict";
import { Group, redirectConnects, unwrapArriving, wrapLeaving } from "./support/bpf.ts";
import { Network, SERVER } from "./support/namespaces.ts";
import { Capture } from "./support/packets.ts";
import { Background, dscpGet, testWith } from "./support/processes.ts";
import { startPython } from "./support/servers.ts";

// What a host does to its own packets so that the network gets others, or none.

const URL = `http://${SERVER.ipv4}:8086/`;
const HANDED =
  /^sent +\d packets? with 0xB8, handed to a program on this host, whose own packets /m;

/** A proxy that answers from the address that was asked, IP_TRANSPARENT of ip(7). */
const TRANSPARENT = `import http.server, socket
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    def server_bind(self):
        self.socket.setsockopt(socket.SOL_IP, 19, 1)
        super().server_bind()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = Server(("::", 8086), Handler)
print("listening", flush=True)
server.serve_forever()`;

/** Whether a run is not proved, since its packets are handed to a program on this host. */
async function assertHanded(url: string, network: Network, args: readonly string[] = []) {
  const required = await dscpGet(["--require-proof", ...args, url], network.client);
  assert.equal(required.code, 104, required.stderr);
  assert.match(required.stderr, /^dscp-get: the packets were handed to a program on this host$/m);
  const { code, stderr } = await dscpGet([...args, url], network.client);
  assert.equal(code, 0, stderr);
  assert.match(stderr.replace(/\n +/g, " "), HANDED);
}

for (const [family, target] of [["-4", SERVER.ipv4], ["-6", `[${SERVER.ipv6}]`]] as const) {
  testWith(
    ["root", "ip", "nft", "python3", "tcpdump"],
    `a rule that keeps packets here, whatever their target, is found out; tcpdump agrees: ${family}`,
    async () => {
      await using network = await Network.create();
      const { client } = network;
      const chain = "add chain inet t o { type route hook output priority mangle; }";
      const rule = "add rule inet t o tcp dport 8086 meta mark set 7";
      await client.run("nft", `add table inet t; ${chain}; ${rule}`);
      await client.run("ip", family, ..."rule add fwmark 7 lookup 77".split(" "));
      await client.run("ip", family, ..."route add local default dev lo table 77".split(" "));
      await using proxy = new Background([...client.under, "python3", "-c", TRANSPARENT]);
      await proxy.until((said) => said.includes("listening"));
      await using device = await Capture.start(8086, "c0", client.under);
      await using loopback = await Capture.start(8086, "lo", client.under);
      for (const args of [[], ["--mark-syn"]]) {
        await assertHanded(`http://${target}:8086/`, network, args);
      }
      await loopback.until((all) =>
        all.filter(({ tos, length }) => tos === 0xb8 && length > 0).length > 3
      );
      assert.deepEqual(device.packets, []);
    },
  );
}

testWith(
  ["root", "ip", "nft", "python3"],
  "packets to any address of this host that a rule chose are handed to a program; those to its own are not",
  async () => {
    await using network = await Network.create();
    const { client } = network;
    await client.run(..."ip addr add 192.0.2.77/32 dev c0".split(" "));
    await client.run(..."ip addr add 192.0.2.78/24 dev c0".split(" "));
    await using _proxy = await startPython(["8086", "-b", "::"], client.under);
    for (const own of ["192.0.2.2", "192.0.2.77", "192.0.2.78", "[2001:db8:1::2]", "127.3.4.5"]) {
      const { code, stderr } = await dscpGet(["--require-proof", `http://${own}:8086/`], client);
      assert.equal(code, 0, stderr);
    }
    const chain = "add chain ip n o { type nat hook output priority -100; }";
    const rule = `add rule ip n o ip daddr ${SERVER.ipv4} tcp dport 8086 dnat to 192.0.2.77`;
    await client.run("nft", `add table ip n; ${chain}; ${rule}`);
    await assertHanded(URL, network);
    // A host may be allowed to use addresses that are not its own.
    await client.run("sysctl", "-qw", "net.ipv4.ip_nonlocal_bind=1");
    await assertHanded(URL, network);
  },
);

const noGroups = Group.root === null ? ["cgroup2"] : [];

testWith(
  ["root", "ip", "python3", "tcpdump", ...noGroups],
  "a BPF program that connects the socket to another address is found out, whichever socket it is",
  async () => {
    await using network = await Network.create();
    const { client } = network;
    await using group = await Group.create();
    await using _proxy = await startPython(["8087", "-b", "127.0.0.1"], client.under);
    await using _program = await redirectConnects(group.folder, "127.0.0.1", 8087);
    const under = [...group.under, ...client.under];
    for (const args of [[], ["--mark-syn"], ["-4"]]) {
      const { code, stdout } = await dscpGet(["--require-proof", "--json", ...args, URL], {
        under,
      });
      const { sent, remote, error } = JSON.parse(stdout);
      assert.deepEqual([code, sent.proved, remote?.address], [104, null, "127.0.0.1"]);
      assert.equal(error.message, "the packets were handed to a program on this host");
    }
    const { code, stderr } = await dscpGet([URL], { under });
    assert.equal(code, 0);
    assert.match(
      stderr.replace(/\n +/g, " "),
      /with 0xB8, handed to a program on this host, wh/,
    );
    // Nothing rewrites what was asked for.
    const asked = await dscpGet(["--require-proof", `http://127.0.0.1:8087/`], { under });
    assert.equal(asked.code, 0, asked.stderr);
  },
);

for (
  const [what, protocol, tos, front, trailer, code] of [
    ["ESP without a cipher, and its trailer", 50, "00", "0000000100000001", 16, 101],
    ["the same with the mark copied", 50, "b8", "0000000100000001", 16, 0],
    ["UDP, its length too small", 17, "20", "1234138800000000", 0, 101],
  ] as const
) {
  testWith(
    ["root", "ip", "python3", "tcpdump"],
    `an outer header counts, whatever its length and protocol, tcpdump agrees: ${what}`,
    async () => {
      await using network = await Network.create();
      const { client, router, server } = network;
      await using _server = await startPython(["8086", "-b", "::"], server.under);
      const type = protocol.toString(16).padStart(2, "0");
      const outer = `45${tos} 0050 0000 4000 40${type} 0000 c0000202 c6336402 ${front}`;
      await using _far = await unwrapArriving("r0", protocol, 28, router.under);
      await using _near = await wrapLeaving("c0", outer, trailer, client.under);
      const words = `tcpdump -i c0 -n -v -l -U --immediate-mode ip proto ${protocol}`;
      await using tcpdump = new Background([...client.under, ...words.split(" ")]);
      await tcpdump.until((said) => said.includes("listening on"));
      for (const args of [[], ["--mark-syn"]]) {
        const run = await dscpGet(["--json", "--require-proof", ...args, URL], client);
        const { sent, reply } = JSON.parse(run.stdout);
        assert.deepEqual(
          [run.code, sent.proved, sent.outerTos, sent.packets[0].tos],
          [code, code === 0, parseInt(tos, 16), 0xb8],
        );
        assert.equal(reply.status, 200);
      }
      const byte = tos === "00" ? "0x0" : `0x${tos}`;
      await tcpdump.until((said) => said.includes(` IP (tos ${byte}, `));
      assert.equal(
        tcpdump.said.match(/ IP \(tos 0x/g)!.length,
        tcpdump.said.match(new RegExp(` IP \\(tos ${byte}, `, "g"))!.length,
      );
    },
  );
}
