/**
 * A simulated path: routers of a program between two real hosts, which answer late, not at all, or
 * as a firewall does. Needs root, iproute2, python3 and /dev/net/tun.
 *
 * @module
 */

import { Namespace } from "./namespaces.ts";
import { Background } from "./processes.ts";

/** What a simulated router does; it quotes what it received as real ones do. */
export interface Router {
  /** Milliseconds until it answers (0). */
  readonly late?: number;
  /** Whether it never answers. */
  readonly silent?: boolean;
  /** ToS bytes of packets that it does not pass on. */
  readonly drops?: readonly number[];
  /** ToS bytes before and behind it. */
  readonly rewrites?: Readonly<Record<number, number>>;
  /** It rewrites packets only if their time to live is odd: as if they took two ways. */
  readonly alternates?: boolean;
  /** It answers packets with less time to live left than this by an ICMP error or a RST. */
  readonly rejects?: { readonly below: number; readonly icmp?: readonly [number, number] };
  /** It passes only the first SYN between two ports. */
  readonly once?: boolean;
  /** The ToS byte of its answers, in place of Linux's. */
  readonly icmpTos?: number;
}

/** The addresses of the server on a {@linkcode SimulatedPath}. */
export const FAR_SERVER = { ipv4: "10.99.2.1", ipv6: "2001:db8:99:2::1" };

/** The address of a router on a {@linkcode SimulatedPath}, from 1. */
export function routerAddress(hop: number): { ipv4: string; ipv6: string } {
  return { ipv4: `10.99.1.${hop}`, ipv6: `2001:db8:99:1::${hop}` };
}

/** Two hosts with simulated routers in between, deleted when disposed of. */
export class SimulatedPath implements AsyncDisposable {
  private constructor(
    readonly client: Namespace,
    readonly server: Namespace,
    private readonly program: Background,
  ) {}

  /** Creates them. @param late milliseconds that the server's packets take */
  static async create(routers: readonly Router[], late = 0): Promise<SimulatedPath> {
    const stack = new AsyncDisposableStack();
    try {
      const client = stack.use(await Namespace.create());
      const server = stack.use(await Namespace.create());
      const what = JSON.stringify({ routers, late, names: [client.name, server.name] });
      const program = stack.use(new Background(["python3", "-u", "-c", PROGRAM, what]));
      await program.until((said) => said.includes("ready"));
      return new SimulatedPath(client, server, program);
    } catch (error) {
      await stack.disposeAsync();
      throw error;
    }
  }

  /** Waits for the SYNs of a program that has ended: their time to live, mark and source port. */
  async syns(): Promise<{ ttl: number; tos: number; port: number }[]> {
    // A refused connection behind them.
    const last = ["ip", "netns", "exec", this.client.name, "python3", "-c", LAST];
    await new Background(last).end();
    const all = (said: string) =>
      [...said.matchAll(/^syn (\d+) (\d+) (\d+) (\d+)$/gm)].map(([, ...words]) =>
        words.map(Number)
      );
    const said = await this.program.until((said) => all(said).some(([, , , to]) => to === 9));
    return all(said).filter(([, , , to]) => to !== 9)
      .map(([ttl, tos, port]) => ({ ttl, tos, port }));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.program.stop("SIGKILL");
    await this.client[Symbol.asyncDispose]();
    await this.server[Symbol.asyncDispose]();
  }
}

const LAST = `
import socket
try: socket.create_connection(("${FAR_SERVER.ipv4}", 9), 0.2)
except OSError: pass
`;

const PROGRAM = `
import ctypes, fcntl, heapq, json, os, select, socket, struct, subprocess, sys, time
what = json.loads(sys.argv[1])
routers, libc = what["routers"], ctypes.CDLL(None)

def tun(name, ipv4, ipv6):
    with open("/run/netns/" + name) as namespace:
        if libc.setns(namespace.fileno(), 0x40000000) != 0: sys.exit("setns")
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, 0x400454ca, struct.pack("16sH", b"path", 0x1001))
    for words in ["addr add %s/32 dev path" % ipv4, "-6 addr add %s/128 dev path nodad" % ipv6,
                  "link set path up", "route add default dev path",
                  "-6 route add default dev path"]:
        subprocess.run(["ip"] + words.split(), check=True)
    return fd

client = tun(what["names"][0], "10.99.0.1", "2001:db8:99::1")
server = tun(what["names"][1], "${FAR_SERVER.ipv4}", "${FAR_SERVER.ipv6}")

def checksum(data):
    if len(data) % 2: data += b"\\0"
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff

def marked(packet, tos, ttl):
    packet = bytearray(packet)
    if packet[0] >> 4 == 4:
        packet[1], packet[8] = tos, ttl
        packet[10:12] = b"\\0\\0"
        packet[10:12] = struct.pack("!H", checksum(bytes(packet[:20])))
    else:
        packet[0] = 0x60 | tos >> 4
        packet[1] = (tos & 15) << 4 | packet[1] & 15
        packet[7] = ttl
    return bytes(packet)

def answer(packet, source, protocol, body, tos):
    "A packet from source back to where the packet came from."
    if packet[0] >> 4 == 4:
        head = struct.pack("!BBHHHBBH", 0x45, tos, 20 + len(body), 0, 0, 64, protocol, 0)
        return marked(head + source + packet[12:16] + body, tos, 64)
    head = struct.pack("!IHBB", 6 << 28 | tos << 20, len(body), protocol, 64)
    return head + source + packet[8:24] + body

def pseudo(packet, source, protocol, body):
    if packet[0] >> 4 == 4:
        return source + packet[12:16] + struct.pack("!BBH", 0, protocol, len(body))
    return source + packet[8:24] + struct.pack("!II", len(body), protocol)

def icmp(packet, hop, router, kind):
    isv4, tos = packet[0] >> 4 == 4, tos_of(packet)
    source = socket.inet_pton(socket.AF_INET if isv4 else socket.AF_INET6,
                              ("10.99.1.%d" if isv4 else "2001:db8:99:1::%d") % hop)
    protocol, quote = (1, packet[:28]) if isv4 else (58, packet[:80])
    zero = struct.pack("!BBHI", kind[0], kind[1], 0, 0) + quote
    covered = zero if isv4 else pseudo(packet, source, protocol, zero) + zero
    body = struct.pack("!BBHI", kind[0], kind[1], checksum(covered), 0) + quote
    own = router.get("icmpTos", tos & 0x1e | 0xc0 if isv4 else 0)
    return answer(packet, source, protocol, body, own)

def reset(packet):
    "A RST in the name of the target."
    isv4 = packet[0] >> 4 == 4
    source, tcp = (packet[16:20], packet[20:]) if isv4 else (packet[24:40], packet[40:])
    ports, sequence = tcp[2:4] + tcp[0:2], struct.unpack("!I", tcp[4:8])[0]
    body = ports + struct.pack("!IIBBHHH", 0, sequence + 1 & 0xffffffff, 0x50, 0x14, 0, 0, 0)
    sum = checksum(pseudo(packet, source, 6, body) + body)
    return answer(packet, source, 6, body[:16] + struct.pack("!H", sum) + body[18:], 0)

def tos_of(packet):
    return packet[1] if packet[0] >> 4 == 4 else (packet[0] & 15) << 4 | packet[1] >> 4

queue, seen, count = [], set(), 0
def later(fd, packet, milliseconds):
    global count
    count += 1
    heapq.heappush(queue, (time.monotonic() + milliseconds / 1000, count, fd, packet))

def forward(packet):
    isv4 = packet[0] >> 4 == 4
    if (packet[9] if isv4 else packet[6]) != 6: return
    first = packet[8] if isv4 else packet[7]
    tcp = packet[20:] if isv4 else packet[40:]
    if tcp[13] & 0x12 == 2:
        print("syn", first, tos_of(packet), tcp[0] << 8 | tcp[1], tcp[2] << 8 | tcp[3])
    for hop, router in enumerate(routers, 1):
        left, tos = first - hop, tos_of(packet)
        packet = marked(packet, tos, left)
        if left == 0:
            # It quotes the packet as it came.
            if not router.get("silent"):
                later(client, icmp(marked(packet, tos, 1), hop, router, (11, 0) if isv4 else (3, 0)),
                      router.get("late", 0))
            return
        if tos in router.get("drops", []): return
        rejects = router.get("rejects")
        if rejects and left < rejects["below"]:
            kind = rejects.get("icmp")
            return later(client, icmp(packet, hop, router, kind) if kind else reset(packet), 0)
        if router.get("once") and tcp[13] & 0x12 == 2:
            if tcp[:4] in seen: return
            seen.add(tcp[:4])
        behind = router.get("rewrites", {}).get(str(tos))
        if behind is not None and not (router.get("alternates") and first % 2 == 0):
            packet = marked(packet, behind, left)
    later(server, packet, 0)

print("ready")
while True:
    wait = max(0, queue[0][0] - time.monotonic()) if queue else None
    for fd in select.select([client, server], [], [], wait)[0]:
        packet = os.read(fd, 65536)
        if fd == client: forward(packet)
        else: later(client, packet, what["late"])
    while queue and queue[0][0] <= time.monotonic():
        _, _, fd, packet = heapq.heappop(queue)
        os.write(fd, packet)
`;
