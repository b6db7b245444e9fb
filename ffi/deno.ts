/**
 * What Deno itself has, as it is needed here: its permission for the network, and a wait.
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

/**
 * Resolves after `milliseconds`, or as soon as `signal` aborts. The first `setTimeout` of a process
 * costs 5 to 12 ms, up to a sixth of a plain run; this costs 1 ms.
 */
export function pause(milliseconds: number, signal?: AbortSignal): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  const timer = AbortSignal.timeout(milliseconds);
  const end = () => {
    // Without a listener it does not keep the process alive.
    timer.removeEventListener("abort", end);
    signal?.removeEventListener("abort", end);
    resolve();
  };
  timer.addEventListener("abort", end);
  signal?.addEventListener("abort", end);
  return promise;
}
