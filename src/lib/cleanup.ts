/**
 * A last-in-first-out stack of things to undo or release: Node 20 has no AsyncDisposableStack.
 * Use with `await using`, or call `run()` in a finally block.
 *
 * Every step runs even when an earlier one fails. When a step fails the stack throws: one error as
 * it is, several as an AggregateError. `release()` empties the stack without running it, for the
 * moment ownership passes on.
 */
export class CleanupStack implements AsyncDisposable {
  readonly #steps: (() => unknown)[] = [];

  defer(step: () => unknown): void {
    this.#steps.push(step);
  }

  /** Registers a disposable and returns it. */
  use<T extends AsyncDisposable>(resource: T): T {
    this.#steps.push(() => resource[Symbol.asyncDispose]());
    return resource;
  }

  release(): void {
    this.#steps.length = 0;
  }

  /** Hands the steps over to a new stack, which its holder must run. */
  move(): CleanupStack {
    const next = new CleanupStack();
    for (const step of this.#steps.splice(0)) next.defer(step);
    return next;
  }

  async run(): Promise<void> {
    const errors: unknown[] = [];
    for (let step = this.#steps.pop(); step !== undefined; step = this.#steps.pop()) {
      try {
        await step();
      } catch (error) {
        errors.push(error);
      }
    }
    if (errors.length === 1) throw errors[0];
    if (errors.length > 1) throw new AggregateError(errors, 'several cleanup steps failed');
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.run();
  }
}
