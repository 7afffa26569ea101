import type { Command } from 'commander';
import { pushDisks } from '../../capture/capture.js';
import type { PushedDisk } from '../../capture/disk-push.js';
import { makePrivateDirectory } from '../../capture/private-directory.js';
import { openCaptureSource, type CaptureSource } from '../../capture/source.js';
import { CleanupStack } from '../../lib/cleanup.js';
import { AppError } from '../../lib/errors.js';
import { isServedSize } from '../../nbd/copy-windows.js';
import { DIRTY_BITMAP_PREFIX } from '../../nbd/extents.js';
import { exportAt, parseNbdUri } from '../../nbd/uri.js';
import { action, collect, type CommandContext } from '../action.js';
import {
  parseCapture,
  type CaptureOptions,
  type CaptureRequest,
  type DiskRequest,
} from '../capture-request.js';
import type { Schemas } from '../client.js';
import { interruptedFailure, usageFailure, type ExitCode } from '../failure.js';
import { diskNamesOf, followRun } from '../follow.js';
import { ProgressDisplay } from '../progress.js';
import { cancelRun, PushOver, pushServer, requestPush, waitForExports } from '../push-run.js';
import { findDisk, findRepository, findVm } from '../resolve.js';
import type { Session } from '../session.js';

export function addCaptureCommand(program: Command, context: CommandContext): void {
  program
    .command('capture')
    .description('read disks here and push them into a backup: the agent beside a hypervisor')
    .requiredOption('--vm <vm>', 'whose disks, by name or id')
    .requiredOption('--repository <repository>', 'where to, by name or id')
    .requiredOption(
      '--disk <disk>',
      'DISK=SOURCE: an NBD URI, or the path of a file or device; repeatable',
      collect,
    )
    .requiredOption(
      '--change-id <id>',
      'ID, or DISK=ID for each: what a later push counts from; repeatable',
      collect,
    )
    .option('--type <type>', 'auto, full or incremental', 'auto')
    .option(
      '--dirty-context <context>',
      'DISK=CONTEXT[@CHANGE-ID]: it has the changes since; repeatable',
      collect,
    )
    .option('--format <format>', 'of files and devices: raw or qcow2')
    .option('--consistency <promise>', 'of the instant that is read: application, crash or offline')
    .option('--connect <uri>', 'reach the export daemon here: nbd://HOST:PORT, nbd+unix:///?socket=PATH')
    .option(
      '--psk-user <user>',
      'exports for this user alone, with a key of `holdfast export identity create`',
    )
    .option('--x509-name <name>', 'exports for the client with this certificate alone')
    .option('--tls-certificates <directory>', 'with ca-cert.pem, client-cert.pem and client-key.pem')
    .option('--tls-psk-file <file>', 'with USER:KEY lines')
    .option('--tls-username <user>', 'with --tls-psk-file: which of them; default --psk-user')
    .option('--workers <count>', 'connections to each end, where it allows several', '4')
    .option('--rate <bytes>', 'read at most so much a second, e.g. 100MiB')
    .option('--retry-seconds <count>', 'how long a lost connection may stay lost', '120')
    .action(
      action<CaptureOptions>(context, ({ session, options }) =>
        capture(session, { ...parseCapture(options), vm: options.vm, repository: options.repository }),
      ),
    );
}

type Request = CaptureRequest & { vm: string; repository: string };

/** A disk that was asked for, and as the daemon has it recorded. */
interface WantedDisk {
  request: DiskRequest;
  recorded: { id: string; sizeBytes: number };
}

interface OpenDisk extends WantedDisk {
  source: CaptureSource;
}

async function capture(session: Session, request: Request): Promise<ExitCode> {
  const api = await session.api();
  const vm = await findVm(api, request.vm);
  const repository = await findRepository(api, request.repository);
  const wanted = request.disks.map((disk) => ({ request: disk, recorded: findDisk(vm.disks, disk.disk) }));
  if (new Set(wanted.map(({ recorded }) => recorded)).size < wanted.length) {
    throw usageFailure('--disk: two are the same disk');
  }
  const run = await pushAll(session, request, { vmId: vm.id, repositoryId: repository.id, wanted });
  return followRun(session, run);
}

/** The run, when the daemon has all disks or has ended it. */
async function pushAll(
  session: Session,
  request: Request,
  { vmId, repositoryId, wanted }: { vmId: string; repositoryId: string; wanted: readonly WantedDisk[] },
): Promise<Schemas['Run']> {
  await using cleanup = new CleanupStack();
  const disks = await openDisks(session, request, { wanted, cleanup });
  const { type, identity, consistency } = request;
  const push = { identity, consistency, disks: disks.map(toRequestDisk) };
  const body = { vmId, repositoryId, source: 'push', type, whenBusy: 'refuse', push } as const;
  const run = await requestPush(session, body);
  await pushInto(session, request, { run, disks });
  return run;
}

/** All of them before the first is read, so that none is written to meanwhile. */
async function openDisks(
  { environment }: Session,
  request: Request,
  { wanted, cleanup }: { wanted: readonly WantedDisk[]; cleanup: CleanupStack },
): Promise<OpenDisk[]> {
  const runtimeDirectory = cleanup.use(await makePrivateDirectory()).path;
  const control = { runtimeDirectory, connections: request.connections, signal: environment.signal };
  const disks: OpenDisk[] = [];
  for (const disk of wanted) {
    const source = cleanup.use(await openCaptureSource(disk.request.source, control));
    disks.push({ ...disk, source });
  }
  return disks;
}

function toRequestDisk({ request, recorded, source }: OpenDisk): Schemas['PushRequestDisk'] {
  // An NBD server fills up the last sector; what is recorded is exact.
  const isRecorded = request.source.kind === 'nbd' && isServedSize(source.sizeBytes, recorded.sizeBytes);
  return {
    disk: recorded.id,
    sizeBytes: isRecorded ? recorded.sizeBytes : source.sizeBytes,
    lineage: null,
    changeIds: request.dirty === null ? source.bitmaps.filter(isChangeId) : [request.dirty.since],
  };
}

/** What the API takes; a bitmap of any other name is none of ours. */
function isChangeId(name: string): boolean {
  return name.length <= 255 && name === name.trim() && !/\p{Cc}/u.test(name);
}

async function pushInto(
  session: Session,
  request: Request,
  parts: { run: Schemas['Run']; disks: readonly OpenDisk[] },
): Promise<void> {
  const { run } = parts;
  const { signal } = session.environment;
  let cancelling: Promise<void> | undefined;
  // While the copy ends, which may take its two seconds too.
  const cancel = (): void => {
    cancelling ??= cancelRun(session, run.id);
  };
  signal.addEventListener('abort', cancel);
  try {
    if (signal.aborted) cancel();
    await copyDisks(session, request, parts);
    if (signal.aborted) throw interruptedFailure();
  } catch (error) {
    if (!(error instanceof PushOver) || signal.aborted) {
      cancel();
      await cancelling;
      throw signal.aborted ? interruptedFailure() : error;
    }
  } finally {
    signal.removeEventListener('abort', cancel);
  }
}

async function copyDisks(
  session: Session,
  request: Request,
  { run, disks }: { run: Schemas['Run']; disks: readonly OpenDisk[] },
): Promise<void> {
  const { pointId, push } = await waitForExports(session, run);
  const api = await session.api();
  const display = new ProgressDisplay(session.environment.stderr, await diskNamesOf(api, run));
  try {
    await pushDisks({
      disks: push.disks.map((disk) => toPushedDisk(disk, request, disks)),
      server: pushServer(api, pointId, (state) => {
        display.update(state);
      }),
      hash: push.hash,
      clusterBytes: push.clusterBytes,
      silenceMs: push.silenceMs,
      connections: request.connections,
      bytesPerSecond: request.bytesPerSecond,
      retryMs: request.retryMs,
      notify: (text) => {
        display.finish();
        session.note(text);
      },
      signal: session.environment.signal,
    });
  } finally {
    display.finish();
  }
}

function toPushedDisk(wanted: Schemas['PushDisk'], request: Request, disks: readonly OpenDisk[]): PushedDisk {
  const disk = disks.find(({ recorded }) => recorded.id === wanted.diskId);
  const offered = wanted.uris[0];
  if (disk === undefined || offered === undefined) {
    throw new AppError('PUSH_MISMATCH', `the daemon wants disk ${wanted.diskName}, which was not offered`);
  }
  const uri = request.address === null ? offered : exportAt(request.address, wanted.exportName);
  const hasKeys = request.tls.certificates !== undefined || request.tls.pskFile !== undefined;
  if (parseNbdUri(uri).isTls && !hasKeys) {
    throw usageFailure('the exports want TLS: give --tls-psk-file or --tls-certificates');
  }
  const { changeIdFrom } = wanted;
  return {
    diskId: wanted.diskId,
    name: wanted.diskName,
    source: disk.source,
    sink: { uri, tls: request.tls },
    sizeBytes: wanted.sizeBytes,
    method: wanted.method,
    dirtyContext:
      changeIdFrom === null ? null : (disk.request.dirty?.context ?? `${DIRTY_BITMAP_PREFIX}${changeIdFrom}`),
    parentSizeBytes: wanted.parentSizeBytes,
    changeId: disk.request.changeId,
  };
}
