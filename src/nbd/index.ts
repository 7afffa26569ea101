/** NBD in the project's terms: the addon with its errors as AppErrors. */
export type * from '../../native/lib/types.js';
export {
  COPY_OP,
  EXPECT_HASH,
  EXPECT_UNKNOWN,
  EXPECT_ZERO,
  HASH_BYTES,
  hashBlock,
  libnbdVersion,
} from '../../native/lib/index.js';
export { fromNbdError, type SinkRole } from './errors.js';
export { connectNbd, listExports, listMetaContexts, openCopySession } from './session.js';
