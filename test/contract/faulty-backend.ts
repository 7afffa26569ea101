import { AppError } from '../../src/lib/errors.js';
import type { Backend } from '../../repository/backend.js';

export type Fault =
  /** The n-th operation fails before it does anything; later ones work. */
  | { kind: 'fail'; at: number; code: 'REPOSITORY_IO' | 'REPOSITORY_FULL' }
  /** The n-th operation is done, and from then on nothing works any more: the process died there. */
  | { kind: 'crash'; at: number };

export interface FaultyBackend {
  backend: Backend;
  /** Operations seen since `arm`, in order. */
  readonly log: string[];
  /** Starts to count anew, and to misbehave as told. */
  arm(fault?: Fault): void;
}

/** A backend that counts its operations and fails as told. */
export function faultyBackend(inner: Backend): FaultyBackend {
  let fault: Fault | undefined;
  const log: string[] = [];
  const run = async <T>(name: string, work: () => Promise<T>): Promise<T> => {
    if (fault?.kind === 'crash' && log.length >= fault.at) {
      throw new AppError('REPOSITORY_IO', 'the process is dead', { details: { fault: true } });
    }
    log.push(name);
    if (fault?.kind === 'fail' && log.length === fault.at) {
      throw new AppError(fault.code, `injected at ${name}`, { details: { fault: true } });
    }
    return work();
  };
  const backend: Backend = {
    read: (path, options) => run(`read ${path}`, () => inner.read(path, options)),
    readRange: (path, offset, length) =>
      run(`readRange ${path}`, () => inner.readRange(path, offset, length)),
    writeDurable: (path, data, options) =>
      run(`writeDurable ${path}`, () => inner.writeDurable(path, data, options)),
    createExclusive: (path, data, options) =>
      run(`createExclusive ${path}`, () => inner.createExclusive(path, data, options)),
    list: (path) => run(`list ${path}`, () => inner.list(path)),
    rename: (from, to) => run(`rename ${from}`, () => inner.rename(from, to)),
    remove: (path) => run(`remove ${path}`, () => inner.remove(path)),
    removeDirectory: (path) => run(`removeDirectory ${path}`, () => inner.removeDirectory(path)),
    makeDirectory: (path) => run(`makeDirectory ${path}`, () => inner.makeDirectory(path)),
    stat: (path) => run(`stat ${path}`, () => inner.stat(path)),
    capacity: () => run('capacity', () => inner.capacity()),
    syncFile: (path) => run(`syncFile ${path}`, () => inner.syncFile(path)),
    syncDirectory: (path) => run(`syncDirectory ${path}`, () => inner.syncDirectory(path)),
    setReadOnly: (path) => run(`setReadOnly ${path}`, () => inner.setReadOnly(path)),
    localPath: (path) => inner.localPath(path),
  };
  const arm = (next?: Fault): void => {
    fault = next;
    log.length = 0;
  };
  return { backend, log, arm };
}
