/** A terminal, a file or a pipe. */
export interface TextStream {
  write(text: string): unknown;
  isTTY?: boolean | undefined;
  columns?: number | undefined;
}

/** What the command has from the process it runs in; tests give their own. */
export interface CliEnvironment {
  stdout: TextStream;
  stderr: TextStream;
  env: Readonly<Record<string, string | undefined>>;
  /** Aborts on Ctrl-C and SIGTERM. */
  signal: AbortSignal;
}
