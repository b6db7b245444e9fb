/**
 * Three hosts in network namespaces, client – router – server, for tests and for the lab. Needs root and iproute2.
 *
 * @module
 */

import { Namespace } from "./support.ts";

/** Where the server is, as its clients see it. */
export const SERVER = { ipv4: "198.51.100.2", ipv6: "2001:db8:2::2" };

/** The three hosts, wired up; gone when disposed of. */
export class Network implements AsyncDisposable {
  private constructor(
    readonly client: Namespace,
    readonly router: Namespace,
    readonly server: Namespace,
  ) {}

  /** Makes them. The devices: `c0` of the client, `r0` and `r1` of the router, `s0` of the server. */
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
    for (const host of [client, router, server]) {
      await host.run(
        "sysctl",
        "-q",
        "-w",
        "net.ipv6.conf.default.accept_dad=0",
        "net.ipv6.conf.all.accept_dad=0",
      );
    }
    await client.run(
      "ip",
      "link",
      "add",
      "c0",
      "type",
      "veth",
      "peer",
      "name",
      "r0",
      "netns",
      router.name,
    );
    await server.run(
      "ip",
      "link",
      "add",
      "s0",
      "type",
      "veth",
      "peer",
      "name",
      "r1",
      "netns",
      router.name,
    );
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
      const [host, ipv4, ipv6] of [[client, "192.0.2.1", "2001:db8:1::1"], [
        server,
        "198.51.100.1",
        "2001:db8:2::1",
      ]] as const
    ) {
      await host.run("ip", "route", "add", "default", "via", ipv4);
      await host.run("ip", "-6", "route", "add", "default", "via", ipv6);
    }
    await router.run(
      "sysctl",
      "-q",
      "-w",
      "net.ipv4.ip_forward=1",
      "net.ipv6.conf.all.forwarding=1",
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const host of [this.client, this.router, this.server]) await host[Symbol.asyncDispose]();
  }
}
