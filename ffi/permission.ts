/**
 * Deno's permission for the network, which libc does not ask for.
 *
 * @module
 */

/** The state of `--allow-net` for a host, with a port or without. */
export function netPermission(where: string): Deno.PermissionState {
  const stateOf = (host: string) => Deno.permissions.querySync({ name: "net", host }).state;
  // --deny-net may deny a host whose port is allowed.
  return stateOf(where.replace(/:\d+$/, "")) === "denied" ? "denied" : stateOf(where);
}

/**
 * libc bypasses Deno's permissions, so they are checked first.
 *
 * @param where a host, with a port or without
 * @throws {Deno.errors.NotCapable} it may not be used
 */
export function checkPermission(where: string, need: "granted" | "not denied" = "granted"): void {
  const state = netPermission(where);
  if (state === "granted" || (state === "prompt" && need === "not denied")) return;
  const message = `Requires net access to "${where}", run again with the --allow-net flag`;
  throw new Deno.errors.NotCapable(message);
}
