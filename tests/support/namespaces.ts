/**
 * Network namespaces for the tests and the lab: a single one, one that drops packets, three
 * connected hosts, client – router – server, and more of them in a row. Needs root and iproute2.
 *
 * @module
 */

import { execute, type Outcome, succeed } from "./processes.ts";
import { until } from "./waiting.ts";

let namespaces = 0;

/** A network namespace of its own, deleted when disposed of. */
export class Namespace implements AsyncDisposable {
  private constructor(readonly name: string, readonly folder: string | null) {}

  /**
   * Creates one, with its loopback up.
   *
   * @param hosts its /etc/hosts, hosts(5), if it is to have one of its own
   */
  static async create(hosts: string | null = null): Promise<Namespace> {
    if (namespaces === 0) await Namespace.#sweep();
    const name = `dscp-get-${Deno.pid}-${namespaces++}`;
    const namespace = new Namespace(name, hosts === null ? null : `/etc/netns/${name}`);
    if (namespace.folder !== null) {
      await Deno.mkdir(namespace.folder, { recursive: true });
      await Deno.writeTextFile(`${namespace.folder}/hosts`, hosts!);
    }
    await succeed("ip", "netns", "add", namespace.name);
    await namespace.run("ip", "link", "set", "lo", "up");
    return namespace;
  }

  /** One that something else has made, or will make before it is used. */
  static existing(name: string): Namespace {
    return new Namespace(name, null);
  }

  /** Deletes what a run that was killed has left. */
  static async #sweep(): Promise<void> {
    const { stdout } = await execute(["ip", "netns", "list"]);
    for (const [name, pid] of stdout.matchAll(/^dscp-get-(\d+)-\d+/gm)) {
      const isGone = await Deno.stat(`/proc/${pid}`).then(() => false, () => true);
      if (!isGone) continue;
      const folder = `/etc/netns/${name}`;
      const hasFolder = await Deno.stat(folder).then(() => true, () => false);
      await new Namespace(name, hasFolder ? folder : null)[Symbol.asyncDispose]().catch(() => {});
    }
  }

  /** The words before a command line that run it inside. */
  get under(): string[] {
    return ["ip", "netns", "exec", this.name];
  }

  /** Runs a program inside. @throws if its exit code is not 0 */
  async run(...words: string[]): Promise<Outcome> {
    return await succeed(...this.under, ...words);
  }

  /** Runs shell commands inside, until one fails. @throws if one does */
  async script(...commands: string[]): Promise<Outcome> {
    return await this.run("sh", "-ec", commands.join("\n"));
  }

  /** The processes inside. */
  async pids(): Promise<string[]> {
    const { stdout } = await execute(["ip", "netns", "pids", this.name]);
    return stdout.split("\n").filter((line) => line !== "");
  }

  /** Ends all processes inside. */
  async kill(): Promise<void> {
    for (const pid of await this.pids()) {
      try {
        Deno.kill(Number(pid), "SIGKILL");
      } catch { /* it has ended */ }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // A process that still runs inside keeps the namespace alive after its name is deleted.
    await this.kill();
    await succeed("ip", "netns", "delete", this.name);
    if (this.folder !== null) await Deno.remove(this.folder, { recursive: true });
  }
}

/**
 * Creates a namespace that drops every IPv4 packet to a TCP port, so that a connect gets no answer.
 * Needs nft.
 */
export async function silent(port: number): Promise<Namespace> {
  const namespace = await Namespace.create();
  const chain = "add chain ip t in { type filter hook input priority 0; }";
  await namespace.run("nft", `add table ip t; ${chain}; add rule ip t in tcp dport ${port} drop`);
  return namespace;
}

/**
 * Makes a host change one DSCP to another, on IPv4 and IPv6, until `nft flush ruleset`. Needs nft.
 *
 * @param hook where: `output`, `forward` or `prerouting`
 * @param device only in packets that come by this one; by any unless given
 */
export async function rewrite(
  host: Namespace,
  hook: string,
  from: string,
  to: string,
  device?: string,
): Promise<void> {
  const chain = `add chain inet t ${hook} { type filter hook ${hook} priority mangle; }`;
  const which = device === undefined ? "" : `iifname ${device} `;
  const rules = ["ip", "ip6"].map((ip) =>
    `add rule inet t ${hook} ${which}${ip} dscp ${from} ${ip} dscp set ${to}`
  );
  await host.run("nft", ["add table inet t", chain, ...rules].join("; "));
}

/** Returns the connections that wait for an answer to their SYN, one line of ss(8) each. */
export async function attempts(namespace: Namespace): Promise<string[]> {
  const { stdout } = await namespace.run("ss", "-Htn", "state", "syn-sent");
  return stdout.split("\n").filter((line) => line !== "");
}

/** The addresses of the server in a {@linkcode Network}. */
export const SERVER = { ipv4: "198.51.100.2", ipv6: "2001:db8:2::2" };

/** Three connected hosts, deleted when disposed of. */
export class Network implements AsyncDisposable {
  private constructor(
    readonly client: Namespace,
    readonly router: Namespace,
    readonly server: Namespace,
  ) {}

  /**
   * Creates them. The devices are `c0` of the client, `r0` and `r1` of the router, and `s0` of the
   * server.
   */
  static async create(): Promise<Network> {
    const stack = new AsyncDisposableStack();
    const make = async () => stack.use(await Namespace.create());
    try {
      const network = new Network(await make(), await make(), await make());
      await network.#wire();
      return network;
    } catch (error) {
      await stack.disposeAsync();
      throw error;
    }
  }

  async #wire(): Promise<void> {
    const { client, router, server } = this;
    // Duplicate address detection would keep IPv6 addresses unusable for a second.
    const dad = ["net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.all.accept_dad=0"];
    for (const host of [client, router, server]) await host.run("sysctl", "-q", "-w", ...dad);
    const veth = (device: string, peer: string) =>
      `ip link add ${device} type veth peer name ${peer} netns ${router.name}`.split(" ");
    await client.run(...veth("c0", "r0"));
    await server.run(...veth("s0", "r1"));
    for (
      const [host, device, ...addresses] of [
        [client, "c0", "192.0.2.2/24", "2001:db8:1::2/64"],
        [router, "r0", "192.0.2.1/24", "2001:db8:1::1/64"],
        [router, "r1", "198.51.100.1/24", "2001:db8:2::1/64"],
        [server, "s0", "198.51.100.2/24", "2001:db8:2::2/64"],
      ] as const
    ) {
      for (const address of addresses) await host.run("ip", "addr", "add", address, "dev", device);
      await host.run("ip", "link", "set", device, "up");
    }
    for (
      const [host, ipv4, ipv6] of [
        [client, "192.0.2.1", "2001:db8:1::1"],
        [server, "198.51.100.1", "2001:db8:2::1"],
      ] as const
    ) {
      await host.run("ip", "route", "add", "default", "via", ipv4);
      await host.run("ip", "-6", "route", "add", "default", "via", ipv6);
    }
    const forwarding = ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"];
    await router.run("sysctl", "-q", "-w", ...forwarding);
  }

  /** All three. */
  get hosts(): Namespace[] {
    return [this.client, this.router, this.server];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const host of this.hosts) await host[Symbol.asyncDispose]();
  }
}

/**
 * Two hosts with two links, which have the same addresses: fe80::1 is the server on each, fe80::2 the
 * client. The devices are `c0` and `c1` of the client, `s0` and `s1` of the server. Deleted when
 * disposed of.
 */
export class TwinLinks implements AsyncDisposable {
  private constructor(readonly client: Namespace, readonly server: Namespace) {}

  /** Creates them. */
  static async create(): Promise<TwinLinks> {
    const client = await Namespace.create();
    const links = new TwinLinks(client, await Namespace.create());
    try {
      for (const n of [0, 1]) await links.#wire(n);
      return links;
    } catch (error) {
      await links[Symbol.asyncDispose]();
      throw error;
    }
  }

  async #wire(n: number): Promise<void> {
    const { client, server } = this;
    const veth = `ip link add c${n} type veth peer name s${n} netns ${server.name}`;
    await client.run(...veth.split(" "));
    for (
      const [host, device, address] of [[client, "c", "fe80::2"], [server, "s", "fe80::1"]] as const
    ) {
      const on = ["dev", `${device}${n}`];
      await host.run("ip", "link", "set", ...on, "addrgenmode", "none", "up");
      await host.run("ip", "addr", "add", `${address}/64`, ...on, "nodad");
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const host of [this.client, this.server]) await host[Symbol.asyncDispose]();
  }
}

/**
 * A chain of hosts: a client, routers and a server. Link n between them has the networks
 * 10.78.n.0/24 and 2001:db8:n::/64, its nearer end the address 1, its farther one 2. Deleted when
 * disposed of.
 */
export class Chain implements AsyncDisposable {
  private constructor(
    readonly client: Namespace,
    readonly routers: readonly Namespace[],
    readonly server: Namespace,
  ) {}

  /**
   * Creates them. Devices are `near`, towards the client, and `far`, towards the server. Routers
   * answer without a rate limit.
   */
  static async create(routers = 3): Promise<Chain> {
    const stack = new AsyncDisposableStack();
    try {
      const hosts: Namespace[] = [];
      for (let at = 0; at < routers + 2; at++) hosts.push(stack.use(await Namespace.create()));
      // Duplicate address detection would keep IPv6 addresses unusable for a second.
      const settings = "net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0 " +
        "net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.icmp_ratelimit=0 " +
        "net.ipv4.icmp_ratemask=0 net.ipv6.icmp.ratelimit=0";
      const { links, addresses, routes } = wiring(hosts.map(({ name }) => name));
      for (const host of hosts) await host.run("sysctl", "-qw", ...settings.split(" "));
      for (const [at, host] of hosts.entries()) {
        await host.script("ip -batch - <<end", ...links[at], "end");
      }
      for (const [at, host] of hosts.entries()) {
        await host.script("ip -batch - <<end", ...addresses[at], ...routes[at], "end");
      }
      // The kernel may take a second to see that a link is up; only then IPv6 uses it.
      for (const [at, host] of hosts.entries()) {
        for (const device of [...at > 0 ? ["near"] : [], ...at <= routers ? ["far"] : []]) {
          const addresses = `ip -6 -oneline address show dev ${device} scope link`.split(" ");
          const isUp = async () => (await host.run(...addresses)).stdout.includes("fe80");
          await until(isUp, `an address of ${device}`);
        }
      }
      const [client, ...rest] = hosts;
      return new Chain(client, rest.slice(0, -1), rest.at(-1)!);
    } catch (error) {
      await stack.disposeAsync();
      throw error;
    }
  }

  /** All of them. */
  get hosts(): Namespace[] {
    return [this.client, ...this.routers, this.server];
  }

  /** The addresses of the server. */
  get serverAddress(): { ipv4: string; ipv6: string } {
    const link = this.routers.length + 1;
    return { ipv4: `10.78.${link}.2`, ipv6: `2001:db8:${link}::2` };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const host of this.hosts) await host[Symbol.asyncDispose]();
  }
}

/** The addresses of the server in a {@linkcode Chain} of three routers. */
export const CHAIN_SERVER = { ipv4: "10.78.4.2", ipv6: "2001:db8:4::2" };

/** The commands of ip(8) that connect hosts in a row. */
function wiring(names: readonly string[]) {
  const all = names.map((_, at) => at), last = names.length - 1;
  const links = all.map((at) =>
    at === 0 ? [] : [`link add near type veth peer name far netns ${names[at - 1]}`]
  );
  const device = (name: string, link: number, end: number) => [
    `addr add 10.78.${link}.${end}/24 dev ${name}`,
    `addr add 2001:db8:${link}::${end}/64 dev ${name}`,
    `link set ${name} up`,
  ];
  const addresses = all.map((at) => [
    ...at > 0 ? device("near", at, 2) : [],
    ...at < last ? device("far", at + 1, 1) : [],
  ]);
  const routes = all.map((at) => {
    const back = all.slice(1, Math.max(1, at)).flatMap((link) => [
      `route add 10.78.${link}.0/24 via 10.78.${at}.1`,
      `route add 2001:db8:${link}::/64 via 2001:db8:${at}::1`,
    ]);
    if (at === last) return back;
    const [ipv4, ipv6] = [`10.78.${at + 1}.2`, `2001:db8:${at + 1}::2`];
    return [...back, `route add default via ${ipv4}`, `route add ::/0 via ${ipv6}`];
  });
  return { links, addresses, routes };
}
