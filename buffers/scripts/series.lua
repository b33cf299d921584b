-- The time series of adaptd: the commands of buffers/redis_series.py that must be atomic.
--
-- KEYS. All share the hash tag {deployment}, so that they live in one slot of a Redis Cluster.
--   1  domains   zset    domain -> newest point (unix s); `other` included where it was used
--   2, 3, ...    hash    a ring each: "<slot>/<domain>" -> row: bucket number (u32), then counts (u32), little-endian,
--                        zeros at the end left out; slot = bucket % slots
--
-- ARGV.
--   1  now (unix s)      2  domains told apart      3  name of what is beyond them
--   then for each ring   step (s), slots
--   then for each point  time (unix s), domain, counts (u32)*

local CEILING = 4294967295
local now, limit, other = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local rings, next_arg = {}, 4
for i = 2, #KEYS do
  rings[#rings + 1] = {key = KEYS[i], step = tonumber(ARGV[next_arg]), slots = tonumber(ARGV[next_arg + 1])}
  next_arg = next_arg + 2
end

-- A domain that no ring can show any more gives its place up, with every row that it left.
local reach = rings[#rings].step * rings[#rings].slots
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - reach, 'LIMIT', 0, 4)) do
  for _, ring in ipairs(rings) do
    for first = 0, ring.slots - 1, 500 do
      local fields = {}
      for slot = first, math.min(first + 499, ring.slots - 1) do fields[#fields + 1] = slot .. '/' .. name end
      redis.call('HDEL', ring.key, unpack(fields))
    end
  end
  redis.call('ZREM', KEYS[1], name)
end

local function place(domain, at)
  local seen = redis.call('ZSCORE', KEYS[1], domain)
  if not seen then
    local held = redis.call('ZCARD', KEYS[1])
    if redis.call('ZSCORE', KEYS[1], other) then held = held - 1 end
    if held >= limit and domain ~= other then
      domain = other
      seen = redis.call('ZSCORE', KEYS[1], domain)
    end
  end
  if not seen or tonumber(seen) < at then redis.call('ZADD', KEYS[1], string.format('%.3f', at), domain) end
  return domain
end

local function number(row, i) return i * 4 <= #row and struct.unpack('<I4', row, i * 4 - 3) or 0 end

local function added(row, counts)
  local parts = {}
  for i = 1, math.max(#row / 4 - 1, #counts / 4) do
    parts[i] = struct.pack('<I4', math.min(CEILING, number(row, i + 1) + number(counts, i)))
  end
  return string.sub(row, 1, 4) .. table.concat(parts)
end

for i = next_arg, #ARGV, 3 do
  local at, counts = tonumber(ARGV[i]), ARGV[i + 2]
  local name = place(ARGV[i + 1], at)
  for _, ring in ipairs(rings) do
    local bucket = math.floor(at / ring.step)
    local field = (bucket % ring.slots) .. '/' .. name
    local row = redis.call('HGET', ring.key, field)
    local held = row and number(row, 1) or -1
    if held == bucket then
      redis.call('HSET', ring.key, field, added(row, counts))
    elseif held < bucket then
      redis.call('HSET', ring.key, field, struct.pack('<I4', bucket) .. counts)
    end
  end
end
