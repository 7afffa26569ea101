import path from 'node:path';
import { parseArgs } from 'node:util';
import { AppError } from '../../../src/lib/errors.js';

export type OwnSource =
  { kind: 'nbd'; uri: string } | { kind: 'image'; path: string; format: 'raw' | 'qcow2' };

export interface QuickstartOptions {
  /** null: a disk is made. */
  source: OwnSource | null;
  port: number;
  directory: string;
  isStop: boolean;
}

const NBD_URI = /^nbds?(\+unix|\+vsock)?:/;

/** Throws INVALID_INPUT. `base` is where relative paths begin. */
export function parseQuickstartOptions(args: string[], base: string): QuickstartOptions {
  const { values } = parse(args);
  const port = Number(values.port ?? '8007');
  if (!Number.isInteger(port) || port < 1 || port > 65_535) {
    throw new AppError('INVALID_INPUT', '--port must be a TCP port');
  }
  return {
    source: values.source === undefined ? null : parseSource(values.source, values.format, base),
    port,
    directory: path.resolve(
      base,
      values.directory ?? path.resolve(import.meta.dirname, '../../../quickstart-data'),
    ),
    isStop: values.stop === true,
  };
}

function parse(args: string[]) {
  try {
    return parseArgs({
      args,
      options: {
        source: { type: 'string' },
        format: { type: 'string' },
        port: { type: 'string' },
        directory: { type: 'string' },
        stop: { type: 'boolean' },
      },
    });
  } catch (error) {
    throw new AppError('INVALID_INPUT', error instanceof Error ? error.message : String(error));
  }
}

/** The format of a file is stated, or said by its extension; content is never probed. */
function parseSource(text: string, format: string | undefined, base: string): OwnSource {
  if (NBD_URI.test(text)) {
    if (format !== undefined)
      throw new AppError('INVALID_INPUT', '--format is for files, not for an NBD export');
    return { kind: 'nbd', uri: text };
  }
  const stated = format ?? { '.qcow2': 'qcow2', '.raw': 'raw', '.img': 'raw' }[path.extname(text)];
  if (stated !== 'raw' && stated !== 'qcow2') {
    throw new AppError('INVALID_INPUT', `--format raw or --format qcow2 is needed with ${text}`);
  }
  return { kind: 'image', path: path.resolve(base, text), format: stated };
}
