/**
 * The addresses of this host and the network interfaces that have them, getifaddrs(3).
 *
 * @module
 */

import * as libc from "./libc.ts";
import { AF_INET, AF_INET6, headerAddress, sameBytes, SOCKADDR_SIZE } from "./sockaddr.ts";

/** Whether an address, as a `sockaddr`, is one of this host's; its port does not count. */
export function isHostAddress(sockaddr: Uint8Array): boolean {
  const { at, size } = headerAddress(sockaddr);
  // All of 127.0.0.0/8, of which the interface has one.
  return (size === 4 && sockaddr[at] === 127) || interfaceWith(sockaddr) !== null;
}

/** The name of the interface that has an address; `null` if none has, or if it is unknown. */
export function interfaceWith(sockaddr: Uint8Array): string | null {
  const { at, size } = headerAddress(sockaddr), first = new BigUint64Array(1);
  if (libc.getifaddrs(first) < 0) return null;
  const list = Deno.UnsafePointer.create(first[0]);
  let found: string | null = null;
  for (let entry = list; entry !== null && found === null;) {
    // struct ifaddrs { struct ifaddrs *ifa_next; char *ifa_name; unsigned ifa_flags;
    //   struct sockaddr *ifa_addr; … }
    const view = new Deno.UnsafePointerView(entry), address = view.getPointer(24);
    const theirs = new Uint8Array(SOCKADDR_SIZE);
    const family = address === null ? 0 : new Deno.UnsafePointerView(address).getUint16();
    if (family === AF_INET || family === AF_INET6) {
      const length = family === AF_INET ? 16 : SOCKADDR_SIZE;
      Deno.UnsafePointerView.copyInto(address!, theirs.subarray(0, length));
      const { at: atTheirs, size: sizeTheirs } = headerAddress(theirs);
      if (size === sizeTheirs && sameBytes(sockaddr, at, theirs, atTheirs, size)) {
        found = Deno.UnsafePointerView.getCString(view.getPointer(8)!);
      }
    }
    entry = view.getPointer(0);
  }
  libc.freeifaddrs(list);
  return found;
}
